"""LoRA's dropout in training: masks against numpy, learning against PyTorch + PEFT with these masks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import edgepeft
from edgepeft.adapters import PREFIX
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.wiring import DROPOUT
from edgepeft.errors import UpdateRejectedError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.inputs import nothing_dropped
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.training.steps.dropout import Dropout

from .. import models, sharing
from ..interrupting import resumed, same_tensors
from ..techniques import parity
from ..techniques.test_parity import KINDS
from ..techniques.test_parity import adapted as trained
from .test_learning import (
    SEED,
    records,
    torch_losses,
)

RATE = 0.3
FAMILIES = ("llama", "bert", "vit")


def _wrapped(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Modulo 2³², as int32 has it."""
    return values.astype(np.int64).astype(np.int32).astype(np.int64)


def kept(drawn: npt.NDArray[np.int32], lead: tuple[int, ...], width: int) -> npt.NDArray[np.bool_]:
    """What is kept of `[*lead, width]`, by the formula of `exporters.training.dropout`."""
    threshold, *seeds = (int(value) for value in drawn)

    def hashed(count: int, stride: int, seed: int) -> npt.NDArray[np.int64]:
        value = _wrapped(_wrapped(np.arange(count) * stride) + seed)
        for multiplier in (-2048144789, -1028477387):
            value ^= np.trunc(value / 65536).astype(np.int64)
            value = _wrapped(value * multiplier)
        return value ^ np.trunc(value / 65536).astype(np.int64)

    rows = math.prod(lead)
    first = _wrapped(
        2 * hashed(rows, -1640531535, seeds[0])[:, None] + 2 * hashed(width, 1013904223, seeds[1]) + 1
    )
    second = _wrapped(hashed(rows, 374761393, seeds[2])[:, None] + hashed(width, 668265263, seeds[3]))
    return (_wrapped(first * second) >= threshold).reshape(*lead, width)


def drawn_by(bundle: Bundle, step: int) -> dict[str, npt.NDArray[Any]]:
    """What the first batch of a step is given, by module."""
    dropout = Dropout(bundle.manifest, RATE, SEED)
    dropout.begin(step)
    return {name.removeprefix(DROPOUT): value for name, value in dropout.added_to({}).items()}


class Masked(torch.nn.Module):
    """In the place of PEFT's dropout of a module: drops what the bundle's graphs drop, step after step."""

    def __init__(self, bundle: Bundle, module: str) -> None:
        super().__init__()
        self.bundle, self.module, self.step = bundle, module, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        drawn = drawn_by(self.bundle, self.step)[self.module]
        mask = torch.from_numpy(kept(drawn, tuple(x.shape[:-1]), x.shape[-1]))
        return x * mask / (1 - RATE)


def masked(model: Any, bundle: Bundle) -> Any:
    """PEFT's model with these masks."""
    for name, part in model.named_modules():
        if hasattr(part, "lora_dropout") and len(part.lora_dropout):
            assert part.lora_dropout["default"].p == RATE
            part.lora_dropout["default"] = Masked(bundle, name.removeprefix(PREFIX))
    return model


@pytest.fixture(scope="module")
def bundle(shared: sharing.Shared) -> Any:
    """`bundle(family)`: a folder with a bundle `b` and PEFT's adapter `a` with dropout, of random factors."""

    def make(family: str) -> Path:
        def export(root: Path) -> None:
            root.mkdir(parents=True, exist_ok=True)
            settings = parity.options(family, heads=False) | {"r": 4, "lora_dropout": RATE}
            folder = models.save_adapter(parity.FAMILIES[family](), root / "a", 1, **settings)
            edgepeft.export(
                parity.FAMILIES[family](), root / "b", bits=32, adapters={"a": folder}, quick=True
            )

        return shared(f"dropout/{family}", export)

    return make


def adapted(root: Path, output: Path, family: str, **options: Any) -> Any:
    """What is told of an update, kept or not."""
    try:
        return trained(root / "b", output, family, **{"adapter": "a", "steps": 20} | options).to_dict()
    except UpdateRejectedError as error:
        return error.report


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_pytorchs_with_the_same_masks(family: str, bundle: Any) -> None:
    root = bundle(family)
    opened = open_bundle(root / "b")
    adapter = opened.adapter("a")
    given = {**parity.batch(family).arrays}
    rng = np.random.default_rng(0)
    given["labels"] = (
        np.where(given["attention_mask"] == 1, given["input_ids"], -100)
        if family == "llama"
        else rng.integers(0, 3, 4)
    )
    session = GraphSession(opened, "train")
    if "token_type_ids" in session.inputs:
        given["token_type_ids"] = np.zeros_like(given["input_ids"])
    drawn = {f"{DROPOUT}{module}": value for module, value in drawn_by(opened, 1).items()}
    session.bind({**given, **drawn, **graph_inputs(opened, [(adapter, 1.0)])})
    got = {name: value.numpy() for name, value in session.run_for(list(session.outputs)).items()}
    model = masked(parity.in_torch(family, root / "b", root / "a", trains=True), opened)
    loss = model(**{name: torch.from_numpy(value) for name, value in given.items()}).loss
    loss.backward()
    assert float(got["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    gradients = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    factors = {name: value for name, value in gradients.items() if "lora_" in name}
    assert {f"grad.{name}" for name in factors} == {name for name in got if "lora_" in name}
    for name, expected in factors.items():
        np.testing.assert_allclose(got[f"grad.{name}"].T, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_follow_pytorch_with_the_same_masks(family: str, bundle: Any, tmp_path: Path) -> None:
    root = bundle(family)
    model = parity.in_torch(family, root / "b", root / "a", trains=True)
    plain = torch_losses(model, records(KINDS[family]), 20)
    model = masked(parity.in_torch(family, root / "b", root / "a", trains=True), open_bundle(root / "b"))
    expected = torch_losses(model, records(KINDS[family]), 20)
    report = adapted(root, tmp_path / "out", family)
    np.testing.assert_allclose(report["losses"], expected, rtol=0.01)
    assert np.abs(np.array(plain) / expected - 1).max() > 0.02, "nothing was dropped, so nothing was compared"
    assert report["dropout"]["asked"] == {"lora_dropout": RATE}
    assert report["dropout"]["applied"] == report["dropout"]["modules"] > 0
    if report["decision"] == "rejected":
        return
    reopened = parity.in_torch(family, root / "b", tmp_path / "out")
    assert reopened.peft_config["default"].lora_dropout == RATE
    with edgepeft.load(root / "b") as device:
        assert parity.difference(device, family, tmp_path / "out", reopened) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_strategy_drops_the_same(family: str, bundle: Any, tmp_path: Path) -> None:
    """What computes an activation anew drops what was dropped; judging drops nothing."""
    root = bundle(family)
    reports = {
        name: adapted(root, tmp_path / name, family, strategy=name)
        for name in ("resident", "checkpointed", "streamed")
    }
    losses = [report["losses"] for report in reports.values()]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=2e-3)
    judged = [report["held_out_before"]["loss"] for report in reports.values()]
    np.testing.assert_allclose(judged[1:], [judged[0]] * 2, rtol=1e-5)


def test_a_resumed_update_drops_the_same(bundle: Any, tmp_path: Path) -> None:
    """In micro-batches, each of which drops other values."""
    root, data = bundle("llama"), records("llama-tied")
    with edgepeft.load(root / "b", memory_budget="2GiB", threads=1) as device:
        options: dict[str, Any] = {
            "adapter": "a",
            "steps": 8,
            "batch_size": 4,
            "seq_len": 16,
            "learning_rate": 1e-3,
        }
        options |= {"accumulation_steps": 2}
        whole = device.adapt(data, tmp_path / "whole", **options)
        again = resumed(device, data, tmp_path / "again", at=4, **options)
    assert again.losses == whole.losses
    assert same_tensors(tmp_path / "again", tmp_path / "whole")


def test_masks_are_as_independent_as_coins() -> None:
    """Of a share of ones, of each row and column, of pairs along each axis, and of two seeds."""
    rows, width = 400, 500
    rng = np.random.default_rng(5)

    def mask(rate: float) -> npt.NDArray[np.bool_]:
        seeds = rng.integers(-(2**31), 2**31, 4)
        return kept(
            np.array([round(rate * 2**32) - 2**31, *seeds], np.int64).astype(np.int32), (rows,), width
        )

    assert kept(np.array([-(2**31), 1, 2, 3, 4], np.int32), (rows,), width).all()
    for rate in (0.05, 0.1, 0.5):
        for _ in range(4):
            first, second = mask(rate).astype(np.float64), mask(rate).astype(np.float64)
            deviation = math.sqrt(rate * (1 - rate))
            assert abs(first.mean() - (1 - rate)) <= 5 * deviation / math.sqrt(first.size)
            for axis in (0, 1):
                lines = (first.mean(axis) - (1 - rate)) / deviation * math.sqrt(first.shape[axis])
                assert np.abs(lines).max() <= 5
                assert lines.std() == pytest.approx(1, abs=0.2)
            centred, other = ((item - (1 - rate)) / deviation for item in (first, second))
            for pairs in (
                centred[1:] * centred[:-1],
                centred[:, 1:] * centred[:, :-1],
                centred * other,
                # Four places at the corners of rectangles, which sums of rows and columns tie.
                centred[:200, :250] * centred[200:, :250] * centred[:200, 250:] * centred[200:, 250:],
            ):
                assert abs(pairs.mean()) <= 5 / math.sqrt(pairs.size)


def test_what_cannot_be_dropped_is_said(bundle: Any, tmp_path: Path) -> None:
    """Of a bundle that was exported without: the report says so, and the losses are those without dropout."""
    root = bundle("bert")
    plain = tmp_path / "plain"
    models.save_adapter(parity.FAMILIES["bert"](), plain / "a", 1, **parity.options("bert", heads=False), r=4)
    edgepeft.export(
        parity.FAMILIES["bert"](), plain / "b", bits=32, adapters={"a": plain / "a"}, quick=True, verify=False
    )
    assert not nothing_dropped(open_bundle(plain / "b").manifest)
    asked = adapted(plain, tmp_path / "asked", "bert", adapter=str(root / "a"))
    count = len(open_bundle(plain / "b").adapter("a").modules)
    expected = {"asked": {"lora_dropout": RATE}, "modules": count, "applied": 0, "rate": 0.0}
    assert asked["dropout"] == expected
    assert asked["losses"] == adapted(plain, tmp_path / "not", "bert")["losses"]


def test_a_fresh_adapter_of_the_export_has_it(tmp_path: Path) -> None:
    edgepeft.export(
        parity.FAMILIES["bert"](), tmp_path / "b", bits=32, rank=4, lora_dropout=0.1, quick=True, verify=False
    )
    found = open_bundle(tmp_path / "b")
    assert found.adapter("default").config["lora_dropout"] == 0.1
    assert len(nothing_dropped(found.manifest)) == len(found.adapter("default").modules)
