"""Models are cut by their structure: wherever slots are, layers are stages, and a budget can be kept."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import edgepeft
from edgepeft.adapters import save_adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import BudgetError, UpdateRejectedError, UsageError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.inputs import check_batch, model_inputs
from edgepeft.runtime.memory.inference import STREAMED
from edgepeft.runtime.model import Model
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.gradients.strategies import GradientSession
from edgepeft.runtime.training.starting import fresh_adapter
from edgepeft.runtime.training.state.buffers import TrainingState

from .. import models, sharing, zoo
from .test_streamed_inference import too_little, with_memory

#: By family and where slots are: the modules that take a LoRA. A classifier's head is replaced whole: it has
#: slots without any LoRA.
WHERE: dict[tuple[str, str], list[str] | None] = {
    ("bert", "everywhere"): None,
    ("bert", "last layer"): ["layer.1.attention.self.query", "layer.1.output.dense"],
    ("bert", "pooler"): ["pooler.dense"],
    ("bert", "head alone"): [],
    ("llama", "everywhere"): None,
    ("llama", "last layer"): ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"],
    ("llama", "output"): ["lm_head"],
    ("llama", "nowhere"): [],
}
TRAINED = [case for case in WHERE if case != ("llama", "nowhere")]
MEASURED = [("bert", "head alone"), ("llama", "last layer"), ("llama", "nowhere")]
RECORDS = [{"input_ids": [3 + i % 3, 9, 11 + i], "label": i % 3} for i in range(12)]


Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def exported(shared: sharing.Shared) -> Make:
    """`exported(family, where)`: a bundle without adapters, the memory of some measured."""

    def make(family: str, where: str) -> Path:
        def write(folder: Path) -> None:
            with sharing.measured() if (family, where) in MEASURED else contextlib.nullcontext():
                edgepeft.export(zoo.build(family), folder, targets=WHERE[family, where], verify=False)

        return shared(f"where/{family}-{where.replace(' ', '-')}", write)

    return make


def batch(family: str) -> dict[str, np.ndarray]:
    return models.batch(labels=3 if family == "bert" else "tokens").arrays


def layers(manifest: Manifest) -> list[tuple[list[str], int]]:
    """Of the chains of inference and training: the layers of each stage, and how many graphs they have."""
    found = []
    for chain in (manifest.streamed_inference, manifest.partition):
        if chain is not None:
            names = [" ".join(stage.weights.values()) for stage in chain.stages]
            numbers = ["".join(sorted(set(re.findall(r"\.layers?\.(\d)\.", item)))) for item in names]
            found.append((numbers, len({stage.forward for stage in chain.stages})))
    return found


@pytest.mark.parametrize(("family", "where"), WHERE)
def test_the_cuts_are_those_of_a_model_with_slots_everywhere(family: str, where: str, exported: Make) -> None:
    """A layer without slots shares its graph with others that have none."""
    manifest = open_bundle(exported(family, where)).manifest
    expected, got = layers(open_bundle(exported(family, "everywhere")).manifest), layers(manifest)
    assert (manifest.partition is not None) == ((family, where) in TRAINED)
    assert (manifest.missing == {}) == ((family, where) in TRAINED)
    for (numbers, graphs), (wanted, least) in zip(got, expected, strict=False):
        # An output layer that has a LoRA does not run in slices, behind a stage more.
        merged = len(wanted) - len(numbers)
        assert merged == (where == "output" and numbers is not got[0][0])
        assert numbers == wanted[: len(numbers)]
        assert {"0", "1"} <= set("".join(numbers))
        assert graphs == least - merged + (where == "last layer")


@pytest.mark.parametrize(("family", "where"), TRAINED)
def test_the_chain_gives_the_gradients_of_the_one_graph(family: str, where: str, exported: Make) -> None:
    bundle = open_bundle(exported(family, where))
    manifest = bundle.manifest
    rng = np.random.default_rng(0)
    inputs = graph_inputs(bundle, [(fresh_adapter(bundle, 2, 0), 1.0)])
    start = {
        name: 0.1 * rng.standard_normal(inputs[name].shape, np.float32) for name in manifest.policy.trainable
    }
    arrays = check_batch(manifest, model_inputs(manifest, manifest.graphs["train"].inputs), batch(family))
    resident, staged = TrainingState(start), TrainingState(start)
    graph = GradientSession(bundle, "train", inputs, resident)
    loss = graph.run(arrays)
    graph.close()
    chain = Chain(bundle, {**inputs, **staged.parameters})
    assert chain.gradients(arrays, staged) == pytest.approx(loss, rel=1e-6, abs=2e-6)
    chain.close()
    assert any(gradient.any() for gradient in resident.gradients.values())
    for name, expected in resident.gradients.items():
        got = staged.gradients[name]
        assert np.linalg.norm(got - expected) <= 1e-5 * max(np.linalg.norm(expected), 1e-3), name


@pytest.mark.parametrize(("family", "where"), TRAINED)
def test_every_strategy_learns_the_same_in_a_budget(
    family: str, where: str, exported: Make, tmp_path: Path
) -> None:
    """And where the budget holds none, the smallest that would do is named."""
    path, budget_bytes = exported(family, where), too_little()
    losses = {}
    for strategy in ("resident", "checkpointed", "streamed"):
        with edgepeft.load(path, memory_budget=budget_bytes) as device:
            try:
                options: dict[str, Any] = {"rank": 2, "steps": 4, "seq_len": 8, "learning_rate": 1e-2}
                report = device.adapt(RECORDS, tmp_path / strategy, strategy=strategy, **options).to_dict()
            except UpdateRejectedError as error:
                report = error.report
        assert report["strategy"].startswith(strategy)
        assert report["memory"]["measured_peak_bytes"] <= budget_bytes
        losses[strategy] = report["losses"]
    np.testing.assert_allclose(losses["checkpointed"], losses["resident"], rtol=1e-4)
    np.testing.assert_allclose(losses["streamed"], losses["checkpointed"], rtol=1e-6)
    with edgepeft.load(path, memory_budget="1MiB") as device, pytest.raises(BudgetError, match="at least"):
        device.adapt(RECORDS, tmp_path / "small", rank=2, steps=1, seq_len=8)


@pytest.mark.parametrize(("family", "where"), WHERE)
def test_inference_is_streamed_where_the_budget_holds_no_more(
    family: str, where: str, exported: Make
) -> None:
    opened = open_bundle(exported(family, where))
    given = {name: value for name, value in batch(family).items() if name != "labels"}
    counted = given["attention_mask"] == 1 if family == "llama" else ...
    with Model(opened, threads=1) as whole:
        (expected,) = whole.forward(given).values()
        tokens = whole.generate_ids([5, 6, 7], max_new_tokens=6) if family == "llama" else []
    small = dataclasses.replace(opened, manifest=with_memory(opened.manifest))
    with Model(small, memory_budget_bytes=too_little(), threads=1) as model:
        (got,) = model.forward(given).values()
        np.testing.assert_allclose(got[counted], expected[counted], rtol=0, atol=1e-4)
        if family == "llama":
            assert model.generate_ids([5, 6, 7], max_new_tokens=6) == tokens
        assert set(model._sessions._open) == {STREAMED}


def test_what_has_no_slots_is_not_trained(exported: Make, tmp_path: Path) -> None:
    path = exported("llama", "nowhere")
    manifest = open_bundle(path).manifest
    assert (manifest.slots, manifest.strategies, manifest.adapters) == ((), (), ())
    assert set(manifest.missing.values()) == {"there is no slot for an adapter"}
    with edgepeft.load(path) as device:
        with pytest.raises(UsageError, match="no slots for an adapter: export it with --rank"):
            device.adapt(RECORDS, tmp_path / "new", rank=2)
        with pytest.raises(UsageError, match="no adapter to start from"):
            device.adapt(RECORDS, tmp_path / "new")


def test_a_head_alone_is_what_peft_loads(exported: Make, tmp_path: Path) -> None:
    """PEFT refuses an adapter without target modules; a fresh LoRA has some."""
    bundle = open_bundle(exported("bert", "head alone"))
    fresh = fresh_adapter(bundle, 2, 0)
    save_adapter(fresh.with_tensors({key: value + 1 for key, value in fresh.tensors.items()}, ""), tmp_path)
    model, ids = zoo.build("bert"), torch.tensor([[5, 9, 7]])
    models.use_reference(model, models.read_reference(bundle.path, bundle.manifest))
    with torch.no_grad():
        before = model(ids).logits
        after = peft.PeftModel.from_pretrained(model, tmp_path)(ids).logits
    assert (after - before).abs().max() > 0.1
    with edgepeft.load(bundle.path) as device:
        (got,) = device.forward(
            {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 3), np.int64)}, tmp_path
        ).values()
    np.testing.assert_allclose(got, after, rtol=0, atol=1e-3)
    with pytest.raises(UsageError, match="--targets names nothing that takes one"):
        edgepeft.export(zoo.build("bert"), tmp_path / "b", targets=[], rank=2)
