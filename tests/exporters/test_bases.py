"""What tells a base from another of the same shape, and what becomes of adapters of the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError
from edgepeft.exporters.base_fingerprint import base_fingerprint
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.onnx_file import load_onnx_file
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.starting import starting_adapter

from . import models, sharing, task_models
from .conftest import LORA_TARGETS, Exported


def fingerprint(model: Any, **options: Any) -> str:
    return base_fingerprint(load_source(model, **options))


def llama(**settings: Any) -> transformers.PreTrainedModel:
    """The same weights as always, with other settings."""
    model = models.llama(tied=True)
    config = model.config.to_dict() | settings
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_copies_of_a_checkpoint_are_one_base(tmp_path: Path) -> None:
    """From memory or a folder, in float32 or bfloat16, and a bfloat16 checkpoint in float16."""
    expected = fingerprint(models.llama(tied=True))
    models.llama(tied=True).save_pretrained(tmp_path / "f32")
    models.llama(tied=True).bfloat16().save_pretrained(tmp_path / "bf16")
    models.llama(tied=True).bfloat16().half().save_pretrained(tmp_path / "f16")
    for name in ("f32", "bf16", "f16"):
        assert fingerprint(str(tmp_path / name)) == expected, name


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_another_configuration_is_another_base(settings: dict[str, Any]) -> None:
    """Of the same weights."""
    assert fingerprint(llama(**settings)) != fingerprint(llama())


@pytest.mark.parametrize(
    "settings",
    [
        {"_name_or_path": "elsewhere"},
        {"use_cache": False},
        {"attention_dropout": 0.5},
        {"pad_token_id": 3},
        {"initializer_range": 1.0},
        {"a_switch_of_the_future": False},
    ],
)
def test_what_is_not_computed_with_does_not_count(settings: dict[str, Any]) -> None:
    """Nor what a later version can switch on, while it is off."""
    assert fingerprint(llama(**settings)) == fingerprint(llama())


@pytest.mark.parametrize(
    "build", [models.bert_classifier, lambda: models.llama(tied=False), task_models.t5, task_models.vit]
)
def test_every_weight_counts_but_the_head(build: Callable[[], transformers.PreTrainedModel]) -> None:
    """A little noise on one weight after the other, tables of words among them; a drawn head may be any."""
    torch.manual_seed(1)
    model = build()
    seen = {fingerprint(model)}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter += 0.01 * torch.randn_like(parameter)
        if name.startswith("classifier."):
            assert fingerprint(model) in seen, name
        else:
            assert fingerprint(model) not in seen, name
        seen.add(fingerprint(model))


def test_other_labels_are_the_same_base(tmp_path: Path) -> None:
    """The head is drawn, and adapters bring their own."""
    models.bert_classifier().save_pretrained(tmp_path)
    expected = fingerprint(models.bert_classifier())
    for labels, seed in ((["a", "b"], 0), (["a", "b"], 1), (["a", "b", "c", "d"], 0)):
        options = {"task": "text-classification", "labels": labels, "seed": seed}
        assert fingerprint(str(tmp_path), **options) == expected


def test_an_onnx_file_is_known_by_its_operators_and_initializers(
    files: Callable[[str], Path], tmp_path: Path
) -> None:
    """In another folder too; another weight, or another operator, is another base."""
    model = onnx.load(files("llama-script"))
    path = tmp_path / "same" / "other-name.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    expected = base_fingerprint(load_onnx_file(files("llama-script")))
    assert base_fingerprint(load_onnx_file(path)) == expected
    weight = next(item for item in model.graph.initializer if len(item.dims) == 2)
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(values + np.float32(0.01), weight.name))
    onnx.save(model, path)
    changed = base_fingerprint(load_onnx_file(path))
    assert changed != expected
    silu = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    silu.op_type = "Tanh"
    onnx.save(model, path)
    assert base_fingerprint(load_onnx_file(path)) not in (expected, changed)


RECORDS = [
    {"input_ids": [10 + index % 3, 40 + index % 7, 60], "label": f"LABEL_{index % 3}"} for index in range(24)
]


def noisy_bert() -> transformers.PreTrainedModel:
    """`models.bert_classifier`, trained a little further."""
    torch.manual_seed(1)
    model = models.bert_classifier()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def other(shared: sharing.Shared) -> Path:
    """A bundle of another base of the shape of `bert-classifier`."""

    def write(folder: Path) -> None:
        edgepeft.export(noisy_bert(), folder, bits=32, rank=4, targets=LORA_TARGETS["bert"], verify=False)

    return shared("other-base", write)


def test_bundles_of_any_bits_take_each_others_adapters_and_those_of_another_base_do_not(
    exported: Callable[[str, int], Exported], other: Path, tmp_path: Path
) -> None:
    """Trained at 32 bits, it runs and can go on at 4 bits; in the other base's bundle it is refused."""
    at_32, at_4 = (exported("bert-classifier", bits).folder for bits in (32, 4))
    learned = tmp_path / "learned"
    with edgepeft.load(at_32) as model:
        base = model.manifest.base
        model.adapt(RECORDS, learned, adapter="plain", steps=3, seq_len=8)
    assert base is not None
    assert load_adapter(learned).base == load_adapter(at_32 / "adapters" / "plain").base == base
    with edgepeft.load(at_4) as model:
        assert model.manifest.base == base
        model.predict(RECORDS, learned)
    assert starting_adapter(open_bundle(at_4), TrainingOptions(adapter=str(learned))).base == base
    with edgepeft.load(other) as model:
        assert model.manifest.base not in (None, base)
        assert load_adapter(other / "adapters" / "default").base == model.manifest.base
        with pytest.raises(AdapterError, match=f"was trained on base '{base[:12]}', this one is"):
            model.predict(RECORDS, learned)
        with pytest.raises(AdapterError, match=f"was trained on base '{base[:12]}', this one is"):
            model.adapt(RECORDS, tmp_path / "never", adapter=str(learned), steps=3, seq_len=8)
    with edgepeft.load(other, force=True) as model:
        assert len(model.predict(RECORDS, learned)) == len(RECORDS)


def test_an_adapter_of_another_base_is_not_exported_unless_that_is_meant(
    exported: Callable[[str, int], Exported], other: Path, tmp_path: Path
) -> None:
    """One that says so, that is: a PEFT folder says nothing. By force it becomes one of this base."""
    theirs = exported("bert-classifier", 32).folder / "adapters" / "plain"
    options: dict[str, Any] = {"bits": 32, "adapters": {"theirs": theirs}, "train": False, "verify": False}
    with pytest.raises(AdapterError, match="was trained on base"):
        edgepeft.export(noisy_bert(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    manifest = edgepeft.export(noisy_bert(), tmp_path / "out", force=True, **options)
    assert load_adapter(tmp_path / "out" / "adapters" / "theirs").base == manifest.base
    with edgepeft.load(other) as model:
        assert model.manifest.base == manifest.base
