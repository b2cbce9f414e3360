"""What the exporter refuses, by name, leaving what was there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import edgepeft
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.exporters.quantize.freeze import Freezer
from edgepeft.exporters.verify import pytorch as verify_module

from . import models
from .conftest import LORA_TARGETS


def refuse(match: str, error: type[Exception], output: Path, model: Any, **options: Any) -> None:
    """The export raises, and no trace of it is left beside the output."""
    before = sorted(path.name for path in output.parent.iterdir())
    with pytest.raises(error, match=match):
        edgepeft.export(model, output, **options)
    assert sorted(path.name for path in output.parent.iterdir()) == before


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "image-to-poetry"}, "unknown task 'image-to-poetry': edgepeft exports text-classification"),
        ({"bits": 3}, "bits must be 4, 8, 16 or 32, got 3"),
        ({"block_size": 24}, "block_size must be one of"),
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"labels": ["one"]}, "two or more different names"),
        ({"rank": 4, "targets": ["nonesuch"]}, "--targets nonesuch"),
    ],
)
def test_arguments_that_cannot_be_used(output: Path, options: dict[str, Any], match: str) -> None:
    refuse(match, edgepeft.UsageError, output, models.bert_classifier(), **options)


def test_labels_for_a_task_without_any(output: Path) -> None:
    refuse(
        "goes with text-classification", edgepeft.UsageError, output, models.bert_encoder(), labels=["a", "b"]
    )


def test_a_target_that_no_linear_has(output: Path) -> None:
    refuse(
        "'nonesuch' is not a linear of this model: it has dense, key, query, value",
        edgepeft.ExportError,
        output,
        models.bert_classifier(),
        targets=["nonesuch"],
    )


def test_a_model_that_is_not_there(output: Path, tmp_path: Path) -> None:
    refuse("cannot load|not a transformers model", edgepeft.ExportError, output, str(tmp_path / "out"))


def test_a_model_for_another_task_is_named(output: Path) -> None:
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**models.SIZES))
    refuse("is a model for 'question-answering': unknown task", edgepeft.ExportError, output, model)


def test_an_adapter_for_another_base_names_its_first_module(output: Path, tmp_path: Path) -> None:
    folder = models.save_adapter(
        models.llama(tied=True), tmp_path / "other", 0, r=2, target_modules=["q_proj"]
    )
    refuse(
        r"module model\.layers\.0\.self_attn\.q_proj is no linear of BertForSequenceClassification",
        edgepeft.AdapterError,
        output,
        models.bert_classifier(),
        adapters={"other": folder},
    )


def test_an_adapter_of_another_width_names_its_first_module(output: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**models.SIZES, "hidden_size": 32, "max_position_embeddings": 64}
    wide = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))
    folder = models.save_adapter(
        wide, tmp_path / "narrow", 0, r=2, target_modules=["query"], task_type="SEQ_CLS"
    )
    refuse(
        r"module bert\.encoder\.layer\.0\.attention\.self\.query is 32 -> 32 features in the adapter",
        edgepeft.AdapterError,
        output,
        models.bert_classifier(),
        adapters={"narrow": folder},
    )


def test_an_adapter_without_effect(output: Path, tmp_path: Path) -> None:
    folder = models.save_adapter(models.bert_encoder(), tmp_path / "zero", 0, r=2, target_modules=["query"])
    adapter = load_adapter(folder)
    zeroed = {key: value * (0 if "lora_B" in key else 1) for key, value in adapter.tensors.items()}
    save_adapter(adapter.with_tensors(zeroed, "zero"), folder)
    refuse(
        "adapter 'zero' does not change the output",
        edgepeft.AdapterError,
        output,
        models.bert_encoder(),
        adapters={"zero": folder},
    )


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(edgepeft.UsageError, match=r"holds no manifest\.json, so it is not replaced"):
        edgepeft.export(models.bert_classifier(), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ("OUTPUT_TOLERANCE", "logits with no adapter differs from PyTorch's"),
        ("LOSS_TOLERANCE", "the loss with adapter 'default' is"),
        ("GRADIENT_COSINE", "the gradient of base_model.model.* has cosine"),
    ],
)
def test_a_bundle_that_disagrees_with_pytorch_is_not_written(
    output: Path, monkeypatch: pytest.MonkeyPatch, limit: str, match: str
) -> None:
    """Each comparison can fail: a graph computed on weights that are not the reference's is caught."""
    freeze = Freezer.freeze

    def freeze_and_forget(self: Freezer, graph: Any, weights: Any) -> None:
        freeze(self, graph, weights)
        name = "bert.encoder.layer.1.output.dense.weight"
        self.reference.add(name, self.reference[name] * 1.5)

    monkeypatch.setattr(Freezer, "freeze", freeze_and_forget)
    if limit != "OUTPUT_TOLERANCE":
        monkeypatch.setattr(verify_module, "OUTPUT_TOLERANCE", {32: 1e9})
    if limit == "GRADIENT_COSINE":
        monkeypatch.setattr(verify_module, "LOSS_TOLERANCE", 1e9)
    refuse(
        match,
        edgepeft.VerificationError,
        output,
        models.bert_classifier(),
        bits=32,
        rank=2,
        targets=LORA_TARGETS["bert"],
    )


def test_a_model_without_keys_and_values_is_refused(output: Path) -> None:
    """A state-space model keeps states; there was a StopIteration."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    refuse("keeps something else than keys and values", edgepeft.ExportError, output, model)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "gptq"),
        ({"quantization_config": {"quant_method": "a-method-of-the-future"}}, "a-method-of-the-future"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_a_base_that_is_quantized_already(
    output: Path, tmp_path: Path, settings: dict[str, Any], method: str
) -> None:
    """Whether the package that reads it is there or not."""
    models.llama(tied=True).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    match = rf"quantized already \({method}\).*export the float model"
    refuse(match, edgepeft.ExportError, output, str(tmp_path / "model"))


def test_folders_and_files_that_hold_no_model(output: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    models.bert_classifier().save_pretrained(model)
    weights = model / "model.safetensors"
    refuse("is a file, expected a model's folder", edgepeft.ExportError, output, str(weights))
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse("cannot load .* for text-classification", edgepeft.ExportError, output, str(model))
    weights.unlink()
    refuse(r"holds no weights \(model\.safetensors\)", edgepeft.ExportError, output, str(model))
    (model / "config.json").unlink()
    (model / "small.Q4_0.gguf").write_bytes(b"GGUF")
    refuse(
        r"no config\.json: give a file in it \(small\.Q4_0\.gguf\)", edgepeft.ExportError, output, str(model)
    )


def test_a_model_that_does_not_run_is_no_traceback(output: Path) -> None:
    model = models.bert_encoder()
    model.embeddings.LayerNorm = torch.nn.LayerNorm(7)
    refuse("does not run in PyTorch on input_ids", edgepeft.ExportError, output, model, rank=2)
