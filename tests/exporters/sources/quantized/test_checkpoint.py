"""Whole checkpoints as models: which weights, by which names, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgepeft.errors import ExportError
from edgepeft.exporters.sources import loading
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.quantized.checkpoint import quantized_layout

from ... import models
from . import writers

pytestmark = pytest.mark.versions

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MLX: dict[str, Any] = {"group_size": 32, "bits": 4}
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def check_values(model: Any, expected: dict[str, torch.Tensor]) -> None:
    """Every parameter of the model is what the file says."""
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=5e-7)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gptq(tmp_path: Path, tied: bool, shard: bool) -> None:
    model = models.llama(tied=tied)
    draw = writers.draw_gptq(sym=False, act_order=True)
    expected = writers.quantized_llama(tmp_path, draw, GPTQ | {"desc_act": True}, model, shard=shard)
    source = load_source(str(tmp_path))
    assert (source.task, source.architecture) == ("text-generation", "LlamaForCausalLM")
    linears = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert source.quantized.keys() == {f"{name}.weight" for name in linears - {HEAD}}
    check_values(source.model, expected)
    for name, weight in source.quantized.items():
        assert torch.equal(weight.dequantize(), source.model.get_parameter(name).detach())
    assert not hasattr(source.config, "quantization_config")
    assert source.model.get_input_embeddings().weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.isfinite(source.model(input_ids=torch.arange(8)[None]).logits).all()


def test_awq(tmp_path: Path) -> None:
    expected = writers.quantized_llama(tmp_path, writers.draw_awq(), AWQ, models.llama(tied=True))
    check_values(load_source(str(tmp_path)).model, expected)


def test_mlx_has_a_quantized_embedding_that_the_output_layer_shares(tmp_path: Path) -> None:
    """The weight goes by the product's name, as everywhere."""
    model = models.llama(tied=True)
    expected = writers.quantized_llama(
        tmp_path, writers.draw_mlx(), MLX, model, key="quantization", also=(EMBEDDING,)
    )
    source = load_source(str(tmp_path))
    assert "lm_head.weight" in source.quantized
    assert f"{EMBEDDING}.weight" not in source.quantized
    check_values(source.model, expected)
    assert not hasattr(source.config, "quantization")


def test_a_quantized_output_layer(tmp_path: Path) -> None:
    model = models.llama(tied=False)
    expected = writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, model, also=(HEAD,))
    source = load_source(str(tmp_path))
    assert "lm_head.weight" in source.quantized
    check_values(source.model, expected)


def test_an_encoder_of_a_language_model(tmp_path: Path) -> None:
    """A base model names its modules without a prefix, and has no output layer."""
    model = models.llama(tied=False)
    expected = writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, model, also=(HEAD,))
    source = load_source(str(tmp_path), task="feature-extraction")
    assert all(name.startswith("layers.") for name in source.quantized)
    assert len(source.quantized) == 14
    check_values(source.model, {name.removeprefix("model."): tensor for name, tensor in expected.items()})


def test_new_classes(tmp_path: Path) -> None:
    """Only the head is drawn, and with the seed."""
    expected = writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    first, second, other = (
        load_source(str(tmp_path), task="text-classification", labels=["a", "b", "c"], seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(first.model.score.weight, second.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)
    check_values(first.model, expected | {"score.weight": first.model.score.weight.detach()})


def test_gpt2_has_its_outputs_as_columns(tmp_path: Path) -> None:
    """A quantized weight has them as rows."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    name = "transformer.h.0.mlp.c_fc"
    stored = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    made = writers.draw_gptq()(256, 64, np.random.default_rng(0))
    del stored[f"{name}.weight"]
    stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in made.tensors.items()}
    writers.write(tmp_path, stored, writers.described(model) | {"quantization_config": GPTQ})
    source = load_source(str(tmp_path))
    assert source.quantized[f"{name}.weight"].shape == (256, 64)
    assert torch.equal(source.model.get_parameter(f"{name}.weight").detach(), made.weight.T)


def test_generation_settings_are_the_folders(tmp_path: Path) -> None:
    writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "do_sample": true}')
    found = load_source(str(tmp_path)).model.generation_config
    assert (found.eos_token_id, found.do_sample) == ([7, 9], True)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.qzeros"])
def test_a_tensor_that_is_missing(tmp_path: Path, name: str) -> None:
    writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=f"^{tmp_path}: {name} is not there.*compare the folder"):
        load_source(str(tmp_path))


def test_a_weight_of_no_known_kind(tmp_path: Path) -> None:
    """8-bit floats beside the modules of GPTQ."""
    writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    reason = r"is stored as F8_E4M3 \[320, 64\], expected \[320, 64\] floats"
    with pytest.raises(ExportError, match=f"{name} {reason}"):
        load_source(str(tmp_path))


def test_a_module_that_cannot_be_quantized(tmp_path: Path) -> None:
    """A norm has a vector."""
    writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.qweight"] = torch.zeros(8, 64, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.norm is quantized, but a LlamaRMSNorm in the model"):
        load_source(str(tmp_path))


def test_modules_of_another_model(tmp_path: Path) -> None:
    tensors = {"decoder.up.qweight": torch.zeros(8, 64, dtype=torch.int32)}
    config = writers.described(models.llama(tied=True)) | {"quantization_config": GPTQ}
    writers.write(tmp_path, tensors, config)
    with pytest.raises(ExportError, match=r"decoder\.up is no module of LlamaForCausalLM"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("method", ["hqq", "fp8", "mxfp4", "quanto"])
def test_methods_that_are_not_read(tmp_path: Path, method: str) -> None:
    match = rf"{tmp_path}: its weights are quantized already \({method}\).*export the float model"
    with pytest.raises(ExportError, match=match):
        quantized_layout(tmp_path, {"quantization_config": {"quant_method": method}})


def test_descriptions_that_are_none(tmp_path: Path) -> None:
    assert quantized_layout(tmp_path, {"quantization_config": {}}) is None
    with pytest.raises(ExportError, match="is 'gptq', expected an object"):
        quantized_layout(tmp_path, {"quantization_config": "gptq"})


def test_an_old_description_of_bitsandbytes(tmp_path: Path) -> None:
    """It named no method."""
    writers.write(tmp_path, {"part.SCB": torch.ones(1)}, {})
    layout = quantized_layout(tmp_path, {"quantization_config": {"load_in_8bit": True}})
    assert layout is not None
    assert layout.modules() == ["part"]


def index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), "utf-8")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    config = {"quantization_config": GPTQ}
    with pytest.raises(ExportError, match=r"\*\.safetensors are not there"):
        quantized_layout(tmp_path, config)
    index(tmp_path, {"weight_map": {"a": "one.safetensors"}})
    with pytest.raises(ExportError, match=r"one\.safetensors is not there"):
        quantized_layout(tmp_path, config)
    (tmp_path / "one.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ExportError, match=r"one\.safetensors cannot be read"):
        quantized_layout(tmp_path, config)
    index(tmp_path, {"weight_map": {"a": "../one.safetensors"}})
    with pytest.raises(ExportError, match="outside the folder"):
        quantized_layout(tmp_path, config)
    index(tmp_path, {"weight_map": {"a": 1}})
    with pytest.raises(ExportError, match="has no weight_map"):
        quantized_layout(tmp_path, config)


def test_an_adapter_of_it_is_not_merged(tmp_path: Path) -> None:
    """Merging would round once more what is kept exactly."""
    writers.quantized_llama(tmp_path / "base", writers.draw_gptq(), GPTQ, models.llama(tied=True))
    adapter = models.save_adapter(
        models.llama(tied=True),
        tmp_path / "adapter",
        seed=1,
        r=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    file = adapter / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    with pytest.raises(ExportError, match="export the base with --adapter NAME=DIR"):
        load_source(str(adapter))


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its files are asked for at once."""
    expected = writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    asked: list[str] = []

    def kept(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", kept)
    monkeypatch.setattr(loading, "read_json", lambda _, name: json.loads((tmp_path / name).read_text()))
    model, quantized = loading._load_pretrained("somebody/model", "text-generation", None)
    assert asked == ["somebody/model"]
    assert len(quantized) == 14
    check_values(model, expected)


def test_an_output_layer_that_the_description_ties_and_the_file_does_not(tmp_path: Path) -> None:
    model = models.llama(tied=False)
    expected = writers.quantized_llama(
        tmp_path, writers.draw_mlx(), MLX, model, key="quantization", also=(EMBEDDING, HEAD)
    )
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    source = load_source(str(tmp_path))
    check_values(source.model, expected)
    assert {f"{EMBEDDING}.weight", f"{HEAD}.weight"} <= source.quantized.keys()


def test_a_sentence_encoder_gets_no_new_classes(tmp_path: Path) -> None:
    writers.quantized_llama(tmp_path, writers.draw_gptq(), GPTQ, models.llama(tied=True))
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ExportError, match="a new classifier goes with sentence encoders of floats"):
        load_source(str(tmp_path), task="text-classification", labels=["a", "b"])
