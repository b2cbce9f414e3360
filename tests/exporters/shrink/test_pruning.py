"""Pruned models against PyTorch: hand-made dense ones, models that transformers loads, adapters in PEFT."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

import edgepeft
from edgepeft import cli
from edgepeft.errors import AdapterError, ExportError, UsageError
from edgepeft.exporters import prune
from edgepeft.exporters.base_fingerprint import base_fingerprint
from edgepeft.exporters.options import ExportOptions
from edgepeft.exporters.shrink.feed_forward import feed_forwards, matrix
from edgepeft.exporters.shrink.pruning import prune_source
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.samples import sample_inputs

from .. import foreign, models, task_models, zoo
from ..sources.quantized import writers
from ..sources.quantized.test_exports import AWQ

#: Of the tiny Llama's linears' weights: half of the channels of its feed-forward layers.
HALF = 1 / 3
#: Families whose feed-forward layers differ in form, and what their configurations call the width.
WIDTHS = {
    "llama": ["intermediate_size"],
    "gemma3": ["intermediate_size"],
    "phi3": ["intermediate_size"],
    "gpt2": ["n_inner"],
    "gpt_neox": ["intermediate_size"],
    "opt": ["ffn_dim", "intermediate_size"],
    "bert": ["intermediate_size"],
    "distilbert": ["hidden_dim"],
    "albert": ["intermediate_size"],
    "modernbert": ["intermediate_size"],
    "t5": ["d_ff"],
    "bart": ["decoder_ffn_dim", "encoder_ffn_dim"],
    "vit": ["intermediate_size"],
    "wav2vec2": ["intermediate_size"],
}


def records(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(3, 300, 16).tolist()} for _ in range(count)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**models.batch().tensors)[0]
    return found


@torch.no_grad()
def plant(model: Any, *, constant: bool = False) -> Any:
    """Let half of each layer's channels be 0 for any text, or constant; what reads them stays as it is."""
    one = {"input_ids": torch.arange(3, 19)[None]}
    generator = torch.Generator().manual_seed(0)
    for layer in feed_forwards(model, one)[0]:
        dead = torch.randperm(layer.channels, generator=generator)[: layer.channels // 2]
        for name in layer.producers:
            bias = model.get_submodule(name).bias
            matrix(model, name)[dead] = 0
            if bias is not None:
                bias[dead] = torch.randn(len(dead), generator=generator) if constant else 0
    return model


@pytest.mark.parametrize(
    ("build", "constant"),
    [
        (lambda: models.llama(tied=True), False),
        (models.gpt2, False),
        (models.gpt2, True),
        (models.bert_encoder, True),
    ],
    ids=["llama", "gpt2", "gpt2-constant", "bert-constant"],
)
def test_channels_that_say_nothing_go_and_nothing_changes(
    build: Callable[[], Any], constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant ones go where there is a bias that takes what they make (where the records run in bfloat16, to
    its three digits)."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = plant(build(), constant=constant)
    model.config.use_cache = False
    whole = load_source(model)
    layers = feed_forwards(whole.model, {"input_ids": torch.arange(3, 19)[None]})[0]
    linears = sum(matrix(whole.model, name).numel() for name in whole.linear_names())
    held = sum(matrix(model, name).numel() for x in layers for name in (*x.producers, x.consumer))
    pruned = prune(model, held / 2 / linears, calibration=records())
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    expected = logits(model)
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_it_is_the_whole_model_with_the_channels_at_zero() -> None:
    """And with the weights of the others that least squares give."""
    model = models.llama(tied=True)
    pruned = prune(model, HALF, calibration=records())
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for layer, narrow in zip(dense.model.layers, pruned.model.layers, strict=True):
            rows = [
                next(i for i, row in enumerate(layer.mlp.gate_proj.weight) if torch.equal(row, kept))
                for kept in narrow.mlp.gate_proj.weight
            ]
            assert torch.equal(layer.mlp.up_proj.weight[rows], narrow.mlp.up_proj.weight)
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.weight[:, rows] = narrow.mlp.down_proj.weight
    torch.testing.assert_close(logits(pruned), logits(dense), rtol=0, atol=1e-5)
    assert float((logits(pruned) - logits(model)).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("llama", "phi3", "bert", "vit") else pytest.mark.slow)
        for name in WIDTHS
    ],
)
def test_families_stay_models_that_transformers_loads(tmp_path: Path, family: str) -> None:
    """All feed-forward layers are narrower and nothing else is: heads, poolers and attention stay."""
    model = zoo.build(family)
    source = load_source(model)
    inputs = sample_inputs(source, with_past=False).inputs
    pruning = prune_source(source, [inputs], ExportOptions(prune=0.1, block_size=16))
    assert sorted(pruning.sizes) == WIDTHS[family]
    before, after = dict(model.named_parameters()), dict(source.model.named_parameters())
    changed = {name for name, tensor in after.items() if tensor.shape != before[name].shape}
    assert {f"{name}.weight" for name in [key.removesuffix(".weight") for key in pruning.errors]} <= changed
    assert 0.05 < pruning.share < 0.2
    source.model.save_pretrained(tmp_path / "model")
    loaded, info = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    loaded.eval().config.use_cache = False
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], source.model(**inputs)[0])
        assert torch.isfinite(loaded(**inputs)[0]).all()


@pytest.mark.parametrize("family", ["bloom", "swin"])
def test_widths_that_no_configuration_has_are_refused(family: str) -> None:
    source = load_source(zoo.build(family))
    inputs = sample_inputs(source, with_past=False).inputs
    with pytest.raises(ExportError, match=f"{source.architecture}\\) has no feed-forward layers"):
        prune_source(source, [inputs], ExportOptions(prune=0.25))


@pytest.mark.usefixtures("calibrated")
def test_a_pruned_bundle_learns_and_peft_opens_what_it_learned(tmp_path: Path) -> None:
    """Verified against PyTorch; its base is the pruned model, which is saved and loaded again here."""
    model = models.llama(tied=True)
    pruned = prune(model, HALF, calibration=records())
    pruned.save_pretrained(tmp_path / "pruned")
    manifest = edgepeft.export(model, tmp_path / "bundle", prune=HALF, calibration=records(), rank=4, bits=32)
    assert manifest.pruning is not None
    assert manifest.pruning.sizes == {"intermediate_size": (128, 64)}
    assert manifest.pruning.share == pytest.approx(HALF)
    assert manifest.base == base_fingerprint(load_source(str(tmp_path / "pruned")))
    assert manifest.quantization.calibration is None
    assert manifest.verification["gradients"]["default"]["smallest_cosine"] > 0.9999
    examples = [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in records(8, 1)]
    with edgepeft.load(tmp_path / "bundle") as device:
        device.adapt(examples, tmp_path / "learned", steps=4, learning_rate=1e-2)
        batch = models.batch()
        (got,) = device.forward(batch.arrays, adapter=str(tmp_path / "learned")).values()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "learned").eval()
    expected = logits(opened)
    counted = batch.arrays["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[counted], expected.numpy()[counted], rtol=0, atol=1e-4)
    with opened.disable_adapter():
        assert float((logits(opened) - expected).abs().max()) > 1e-3
    assert manifest.base != base_fingerprint(load_source(model))


def test_encoders_by_records_from_the_command_line(tmp_path: Path) -> None:
    folder = task_models.save_with_words(models.bert_encoder(), tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = [{"text": " ".join(f"w{word}" for word in rng.integers(1, 290, 12))} for _ in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["export", str(folder), "-o", str(tmp_path / "bundle"), "--prune", "25%", "--no-train"]
    refused = CliRunner().invoke(cli.main, command)
    assert refused.exit_code
    assert "give records like those it will read with --calibration" in refused.output
    assert not (tmp_path / "bundle").exists()
    done = CliRunner().invoke(
        cli.main, [*command, "--calibration", str(tmp_path / "texts.jsonl")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "(intermediate_size 128 to 64), by 24 records" in done.stdout
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle"), "--json"])
    pruning = json.loads(shown.stdout)["pruning"]
    assert pruning["sizes"] == {"intermediate_size": [128, 64]}
    assert len(pruning["errors"]) == 2
    assert (
        "(intermediate_size 128 to 64)"
        in CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bundle")]).stdout
    )


def test_adapters_of_the_whole_model_are_refused(tmp_path: Path) -> None:
    """Also those that say nothing of their base and would fit by their shapes."""
    model = models.llama(tied=True)
    adapter = models.save_adapter(model, tmp_path / "adapter", 1, r=4, target_modules=["q_proj"])
    options = {"prune": HALF, "calibration": records(8), "adapters": {"mine": adapter}, "verify": False}
    with pytest.raises(AdapterError, match="prune first and train the adapter on that bundle"):
        edgepeft.export(model, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("share", "match"),
    [
        ("25 percent", "is no share"),
        (1.5, "is no share"),
        ("0%", "is no share"),
        ("70%", "which hold 67% of the weights"),
        ("1%", "channels go by 32"),
    ],
)
def test_shares_that_cannot_be(share: float | str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        prune(models.llama(tied=True), share, calibration=records(4))


def test_sources_that_cannot_be_pruned(tmp_path: Path) -> None:
    """Codes that somebody else chose, unless --bits rounds what is left once more; and an ONNX file."""
    writers.quantized_llama(tmp_path / "awq", writers.draw_awq(), AWQ, models.llama(tied=True))
    options = {"calibration": records(4), "train": False, "verify": False}
    with pytest.raises(UsageError, match=r"--prune: .* quantized already and stay as they are"):
        edgepeft.export(str(tmp_path / "awq"), tmp_path / "bundle", prune=HALF, train=False)
    with pytest.raises(UsageError, match="prune the float model that was quantized"):
        prune(str(tmp_path / "awq"), HALF, calibration=records(4))
    manifest = edgepeft.export(str(tmp_path / "awq"), tmp_path / "bundle", prune=HALF, bits=4, **options)
    assert manifest.pruning is not None
    foreign.export_encoder(models.bert_encoder(), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="--prune needs a transformers model"):
        edgepeft.export(tmp_path / "model.onnx", tmp_path / "other", prune=HALF, train=False)
