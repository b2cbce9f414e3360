"""Calibrated quantization: models and bundles against PyTorch."""

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
from edgepeft.exporters.calibration import calibrate as calibrate_module
from edgepeft.exporters.calibration import groups
from edgepeft.exporters.calibration.calibrate import Sizes, calibrate
from edgepeft.exporters.quantize.blockwise import quantize

from .. import models, task_models

Feeds = dict[str, torch.Tensor]


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
    "gpt2": (lambda: models.gpt2(layers=3), token_feeds),
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
    found = calibrate(model, feeds, Sizes(4, 32), progress=lambda *counts: told.append(counts)).weights
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
    found = calibrate(build(), make(6, 1), Sizes(4, 32)).weights
    answers: list[bool] = []
    can_replay = groups._can_replay

    def no(*arguments: Any) -> bool:
        answers.append(can_replay(*arguments))
        return False

    monkeypatch.setattr(groups, "_can_replay", no)
    again = calibrate(build(), make(6, 1), Sizes(4, 32)).weights
    assert answers == [True]
    assert list(again) == list(found)
    assert all(np.array_equal(again[key].packed, found[key].packed) for key in found)


def test_what_is_kept_is_left_out() -> None:
    found = calibrate(
        models.llama(tied=True), token_feeds(4, 0), Sizes(4, 32), kept=["model.layers.1.mlp"]
    ).weights
    assert "lm_head.weight" in found  # as the embedding goes by, whose rows are looked up
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert not any(name.startswith("model.layers.1.mlp") for name in found)


@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_is_counted_once(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass that says what each loses; of a tied embedding both its uses."""
    asked: list[list[str]] = []

    def note(_model: Any, _feeds: Any, names: Any, *_: Any) -> dict[str, float]:
        asked.append(list(names))
        return {}

    monkeypatch.setattr(calibrate_module, "sensitivities", note)
    calibrate(models.llama(tied=tied), token_feeds(4, 0), Sizes(4, 32))
    (names,) = asked
    assert len(names) == len(set(names)) == 2 * 7 + 2
    assert {"model.embed_tokens", "lm_head"} <= set(names)


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
    calibration = summary["calibration"]
    assert {key: calibration[key] for key in ("method", "records", "rounded", "inputs")} == {
        "method": "gptq",
        "records": 32,
        "rounded": [],
        "inputs": "records",
    }
    errors = calibration["errors"]
    assert "encoder.layer.0.attention.self.query.weight" in errors
    assert all(0 < error < 0.5 for error in errors.values())
    assert 4.625 <= summary["bits_a_weight"] <= 5
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle")], catch_exceptions=False)
    assert f"at 4 bits, {summary['bits_a_weight']:.2f} a weight with scales" in shown.stdout
    assert "calibrated on 32 records" in shown.stdout


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
    assert manifest.quantization.calibration.rounded == ()
    assert max(manifest.verification["decoder_outputs"].values()) < 1e-3
    if train:
        assert manifest.verification["gradients"]["default"]["smallest_cosine"] > 0.9999
    found = calibrate(
        models.llama(tied=False), [{"input_ids": torch.tensor([r["input_ids"]])} for r in records],
        Sizes(bits, 32),
    ).weights  # fmt: skip
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


@pytest.mark.slow
@pytest.mark.usefixtures("calibrated")
def test_a_language_model_without_records(tmp_path: Path) -> None:
    """Verified against PyTorch on what the bundle holds: weights of 4 and of 8 bits side by side."""
    manifest = edgepeft.export(models.llama(tied=True), tmp_path / "bundle", rank=2)
    quantization = manifest.quantization
    assert quantization.calibration is not None
    assert (quantization.calibration.inputs, quantization.calibration.records) == ("own text", 64)
    assert quantization.calibration.rounded == ()
    assert 8 in quantization.exceptions.values()
    assert manifest.verification["gradients"]["default"]["smallest_cosine"] > 0.9999
    assert max(manifest.verification["decoder_outputs"].values()) < 1e-3
    again = edgepeft.export(models.llama(tied=True), tmp_path / "again", rank=2)
    assert again.files[again.weights_file] == manifest.files[manifest.weights_file]
    quick = edgepeft.export(models.llama(tied=True), tmp_path / "quick", rank=2, quick=True)
    assert quick.quantization.calibration is None
    assert set(quick.quantization.exceptions.values()) <= {32}
    smaller = edgepeft.export(models.llama(tied=True), tmp_path / "small", size="58kB", train=False)
    assert smaller.quantization.bits_a_weight < quantization.bits_a_weight


@pytest.mark.usefixtures("calibrated")
def test_a_model_without_a_weight_to_quantize(tmp_path: Path) -> None:
    """No block divides its rows: nothing is calibrated, and nothing is said to be."""
    sizes = {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 3, "head_dim": 20}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=320, num_hidden_layers=2, num_key_value_heads=3, max_position_embeddings=64
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(str(tmp_path / "model"))
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "bundle"), "--no-train", "--no-verify"]
    result = CliRunner().invoke(cli.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "calibrated" not in result.stdout
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle")], catch_exceptions=False)
    assert "at 4 bits\n" in shown.stdout


@pytest.mark.usefixtures("calibrated")
def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    def refuse(match: str, **options: Any) -> None:
        with pytest.raises(edgepeft.UsageError, match=match):
            edgepeft.export(models.llama(tied=True), tmp_path / "bundle", **options)
        assert not (tmp_path / "bundle").exists()

    refuse("goes with 4 bits, and not with quick", size="1MB", bits=8)
    refuse("goes with 4 bits, and not with quick", size="1MB", quick=True)
    refuse("leave one of them out", quick=True, calibration=[{"input_ids": [1]}])
    refuse("not a size", size="one")
    refuse(r"--size 0\.0 MB: the weights take at least 0\.\d MB", size=1000)
