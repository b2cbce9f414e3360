"""Calibrated quantization: the algorithm against plain numpy, models and bundles against PyTorch."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from click.testing import CliRunner

import edgepeft
from edgepeft import cli
from edgepeft.exporters.quantize import calibrate as calibration_module
from edgepeft.exporters.quantize.blockwise import quantize
from edgepeft.exporters.quantize.calibrate import calibrate
from edgepeft.exporters.quantize.gptq import DAMPING, InputStatistics, gptq

from .. import models, task_models

Feeds = dict[str, torch.Tensor]


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Values of which some directions hold most, and some columns much more than others."""
    mixture = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    mixture *= torch.logspace(0, -2, columns)[:, None] * torch.linspace(0.3, 3, columns)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) @ mixture


def by_hand(weight: np.ndarray, exact: np.ndarray, read: np.ndarray, block_size: int) -> np.ndarray:
    """The paper's method a column at a time, in float64: the inverse of what is left of the Hessian is
    computed anew for each. Only the scales of a block are the exporter's own."""

    def damped(rows: slice) -> np.ndarray:
        hessian = read[rows].T @ read[rows]
        return np.asarray(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian)))

    def least_squares(rows: slice) -> np.ndarray:
        wanted = (exact[rows] - read[rows]) @ weight.T
        return np.linalg.solve(damped(rows), read[rows].T @ wanted).T

    half, others = slice(len(read) // 2), slice(len(read) // 2, None)
    effect = (read[others] @ least_squares(half).T).ravel()
    wanted = ((exact[others] - read[others]) @ weight.T).ravel()
    fraction = np.clip(effect @ wanted / (effect @ effect), 0, 1)
    assert 0.1 < fraction < 1
    hessian = damped(slice(None))
    left = weight + fraction * least_squares(slice(None))
    importance = np.diag(hessian).reshape(-1, block_size)
    columns = [
        block * block_size + column
        for block in np.argsort(-importance.sum(1))
        for column in np.argsort(-importance[block])
    ]
    result = np.zeros_like(weight)
    for position, column in enumerate(columns):
        if position % block_size == 0:
            block = sorted(columns[position : position + block_size])
            found = quantize(torch.from_numpy(left[:, block]), 4, block_size)
            scales = found.scales.values[:, 0].astype(np.float64)
        rest = columns[position:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        result[:, column] = np.clip(np.round(left[:, column] / scales), -8, 7) * scales
        error = (left[:, column] - result[:, column]) / inverse[0, 0]
        left[:, rest] -= np.outer(error, inverse[0])
    return result


def test_it_is_the_papers_method() -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    exact = correlated(300, 64, seed=1)
    read = 0.95 * exact + 0.05 * correlated(300, 64, seed=2)
    halves = InputStatistics.empty(64), InputStatistics.empty(64)
    for part in range(0, 300, 50):
        halves[part // 150].add(exact[part : part + 50], read[part : part + 50])
    parts = gptq([weight[:5], weight[5:]], halves, 4, 16)
    assert [part.shape for part in parts] == [(5, 64), (7, 64)]
    got = np.concatenate([part.dequantize().numpy() for part in parts])
    expected = by_hand(*(value.double().numpy() for value in (weight, exact, read)), block_size=16)
    # A value between two codes may go either way in float32, and changes those after it in its row.
    same = [np.allclose(*rows, atol=1e-4) for rows in zip(got, expected, strict=True)]
    assert sum(same) >= 10


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_on_other_inputs_are_nearer_than_by_rounding(bits: int) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    halves = InputStatistics.empty(128), InputStatistics.empty(128)
    rows = correlated(600, 128, seed=1)
    halves[0].add(rows, rows)
    others = correlated(200, 128, seed=2)
    (calibrated,) = gptq([weight], halves, bits, 32)
    errors = [
        float((others @ (found.dequantize() - weight).T).square().mean())
        for found in (calibrated, quantize(weight, bits, 32))
    ]
    assert errors[0] < 0.5 * errors[1]


def token_feeds(count: int, seed: int, **more: Callable[[], torch.Tensor]) -> list[Feeds]:
    """Records of 16 tokens, of which some are much more frequent than others."""
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": torch.from_numpy(rng.integers(0, 300, (1, 16))),
            **{k: make() for k, make in more.items()},
        }
        for _ in range(count)
    ]


def gpt2() -> transformers.PreTrainedModel:
    """Its linears keep their weights as `[in, out]`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=320, n_positions=64, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def albert() -> transformers.PreTrainedModel:
    """All its layers are one, which runs three times."""
    torch.manual_seed(0)
    sizes = {**models.SIZES, "num_hidden_layers": 3, "embedding_size": 32}
    config = transformers.AlbertConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)
    return transformers.AlbertModel(config).eval()


def pixels(count: int, seed: int) -> list[Feeds]:
    values = torch.randn(count, 1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": value.cumsum(-1)} for value in values]


def pairs(count: int, seed: int) -> list[Feeds]:
    return token_feeds(count, seed, decoder_input_ids=lambda: torch.arange(2, 8)[None])


CASES: dict[str, tuple[Callable[[], Any], Callable[[int, int], list[Feeds]]]] = {
    "bert": (models.bert_encoder, token_feeds),
    "llama": (lambda: models.llama(tied=False), token_feeds),
    "gpt2": (gpt2, token_feeds),
    "albert": (albert, token_feeds),
    "t5": (task_models.t5, pairs),
    "vit": (task_models.vit, pixels),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("albert", "t5") else ()) for name in CASES]
)
def test_a_calibrated_model_is_nearer_to_the_float_one(name: str) -> None:
    """Than one whose same weights are rounded, on other inputs."""
    build, make = CASES[name]
    model, feeds, others = build(), make(32, 1), make(8, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told: list[tuple[int, int]] = []
    found = calibrate(model, feeds, bits=4, block_size=32, progress=lambda *counts: told.append(counts))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert told[-1] == (len(found), len(found))

    turned = {f"{key}.weight" for key, module in model.named_modules() if "Conv1D" in type(module).__name__}

    def error(weights: dict[str, np.ndarray]) -> float:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for key, value in weights.items():
                tensor = torch.from_numpy(value)
                changed.get_parameter(key).copy_(tensor.T if key in turned else tensor)
            return sum(float((changed(**one)[0] - model(**one)[0]).square().sum()) for one in others)

    floats = {key: before[key].T if key in turned else before[key] for key in found}
    rounded = {
        key: quantize(value, found[key].bits, 32).dequantize().numpy() for key, value in floats.items()
    }
    assert error({key: weight.dequantize().numpy() for key, weight in found.items()}) < 0.9 * error(rounded)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_blocks_that_are_done_need_not_run_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they returned is kept, and the result is the same to the bit."""
    build, make = CASES[name]
    found = calibrate(build(), make(6, 1), bits=4, block_size=32)
    answers: list[bool] = []
    can_replay = calibration_module._can_replay

    def no(*arguments: Any) -> bool:
        answers.append(can_replay(*arguments))
        return False

    monkeypatch.setattr(calibration_module, "_can_replay", no)
    again = calibrate(build(), make(6, 1), bits=4, block_size=32)
    assert answers == [True]
    assert list(again) == list(found)
    assert all(np.array_equal(again[key].packed, found[key].packed) for key in found)


def test_what_is_kept_and_what_is_looked_up_is_left_out() -> None:
    found = calibrate(
        models.llama(tied=True), token_feeds(4, 0), bits=4, block_size=32, kept=["model.layers.1.mlp"]
    )
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & found.keys()
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert not any(name.startswith("model.layers.1.mlp") for name in found)


def write_texts(path: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    texts = [" ".join(f"w{word}" for word in rng.integers(1, 300, 12)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def test_an_encoder_by_the_command(tmp_path: Path) -> None:
    """Verified against PyTorch on the weights that the bundle holds."""
    folder = task_models.save_with_words(models.bert_encoder(), tmp_path / "model")
    data = write_texts(tmp_path / "texts.jsonl", 32, 0)
    command = ["export", str(folder), "--no-train", "--calibration", str(data), "--json"]
    result = CliRunner().invoke(cli.main, [*command, "-o", str(tmp_path / "bundle")], catch_exceptions=False)
    assert "calibrating" in result.stderr
    summary = json.loads(result.stdout)
    assert summary["verification"]["outputs"]["no adapter"] < 1e-3
    assert summary["calibration"] == {
        "method": "gptq",
        "records": 32,
        "rounded": [],
    }
    exceptions = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["quantization"]["exceptions"]
    assert exceptions["embeddings.word_embeddings.weight"] == 8
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle")], catch_exceptions=False)
    assert "at 4 bits, calibrated on 32 records" in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "train"), [(4, True), (8, False)])
def test_a_decoder_from_python(tmp_path: Path, bits: int, train: bool) -> None:
    """Its prompt, its cache and its gradients are verified against PyTorch; the bundle holds what the
    calibration gave."""
    records = [{"input_ids": feeds["input_ids"][0].tolist()} for feeds in token_feeds(16, 0)]
    manifest = edgepeft.export(
        models.llama(tied=False), tmp_path / "bundle", bits=bits, rank=2, calibration=records, train=train
    )
    assert manifest.quantization.calibration is not None
    assert manifest.quantization.calibration.rounded == (() if bits == 4 else ("model.embed_tokens.weight",))
    assert max(manifest.verification["decoder_outputs"].values()) < 1e-3
    if train:
        assert manifest.verification["gradients"]["default"]["smallest_cosine"] > 0.9999
    found = calibrate(
        models.llama(tied=False), [{"input_ids": torch.tensor([r["input_ids"]])} for r in records],
        bits=bits, block_size=32,
    )  # fmt: skip
    stored = models.read_reference(tmp_path / "bundle", manifest)
    for name, weight in found.items():
        np.testing.assert_array_equal(stored[name].numpy(), weight.dequantize())


@pytest.mark.parametrize("bits", [16, 32])
def test_it_goes_with_quantized_weights_only(tmp_path: Path, bits: int) -> None:
    with pytest.raises(edgepeft.UsageError, match="goes with 4 or 8 bits"):
        edgepeft.export("nowhere", tmp_path / "bundle", bits=bits, calibration=[{"text": "w1"}])


def test_records_that_cannot_be_used(tmp_path: Path) -> None:
    """Said before the work, and nothing is left."""
    model = models.bert_encoder()

    def refuse(calibration: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            edgepeft.export(model, tmp_path / "bundle", calibration=calibration)
        assert not (tmp_path / "bundle").exists()

    (tmp_path / "empty.jsonl").write_text("\n")
    refuse(tmp_path / "empty.jsonl", edgepeft.DataError, "empty.jsonl: holds no records")
    refuse(tmp_path / "none.jsonl", edgepeft.DataError, "none.jsonl: cannot be read")
    refuse(
        [{"text": "w1 w2"}], edgepeft.UsageError, "--calibration: .*: holds no tokenizer.json: give input_ids"
    )
    refuse([{"input_ids": [1]}, {"label": 1}], edgepeft.DataError, "record 2: has the fields 'label'")
    onnx.save(onnx.ModelProto(), str(tmp_path / "model.onnx"))
    with pytest.raises(edgepeft.UsageError, match="needs a transformers model"):
        edgepeft.export(tmp_path / "model.onnx", tmp_path / "bundle", calibration=[{"text": "w1"}])
