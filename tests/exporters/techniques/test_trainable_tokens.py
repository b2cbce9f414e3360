"""Rows of the embedding that an adapter replaces: what the table of methods does not say of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import edgepeft
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, ExportError
from edgepeft.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter

from .. import models


def gemma() -> Any:
    """Scales what it has looked up, of which token 0 is padding; the output layer is tied."""
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        **models.SIZES, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2
    )
    return transformers.GemmaForCausalLM(config).eval()


def saved(model: Any, folder: Path, tokens: list[int], seed: int = 1, **options: Any) -> Path:
    """An adapter with noise on its rows, as PEFT writes it."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        model, peft.TrainableTokensConfig(token_indices=tokens, **{"task_type": "CAUSAL_LM"} | options)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(folder))
    return folder


def logits(model: Any) -> np.ndarray:
    model.config.use_cache = False
    with torch.no_grad():
        found: np.ndarray = model(**models.batch().tensors).logits.numpy()
    return found


def differs(device: Any, adapter: Any, expected: np.ndarray) -> float:
    given = models.batch().arrays
    (got,) = device.forward(given, adapter=adapter).values()
    counted = given["attention_mask"] == 1
    return float(np.abs(got - expected)[counted].max() / max(1.0, np.abs(expected[counted]).max()))


def test_slots_without_an_adapter_at_hand_take_one_later(tmp_path: Path) -> None:
    make = lambda: models.llama(tied=True)  # noqa: E731
    edgepeft.export(make(), tmp_path / "b", bits=32, method="trainable_tokens", quick=True, verify=False)
    path = saved(make(), tmp_path / "a", SOME)
    with edgepeft.load(tmp_path / "b") as device:
        expected = logits(peft.PeftModel.from_pretrained(make(), str(path)).eval())
        assert differs(device, path, expected) <= 1e-4


SOME, OTHERS, MORE = [0, 3, 7, 44, 300], [5, 9], list(range(100, 200))


@pytest.mark.parametrize("make", [gemma, lambda: models.llama(tied=False), lambda: models.llama(tied=True)])
def test_any_tokens_of_any_number_go_into_one_bundle(make: Any, tmp_path: Path) -> None:
    """Scaled embeddings, and output layers that are tied or not; as PEFT opens the folders."""
    paths = [saved(make(), tmp_path / str(len(tokens)), tokens) for tokens in (SOME, OTHERS, MORE)]
    edgepeft.export(make(), tmp_path / "b", bits=32, adapters={"a": paths[0]}, quick=True)
    with edgepeft.load(tmp_path / "b") as device:
        assert differs(device, None, logits(make())) <= 1e-4
        for path in paths:
            expected = logits(peft.PeftModel.from_pretrained(make(), str(path)).eval())
            assert np.abs(expected - logits(make())).max() > 0.05
            assert differs(device, path, expected) <= 1e-4


def test_adapters_of_different_tokens_go_together_as_in_peft(tmp_path: Path) -> None:
    """PEFT 0.21 does not load a second one where a layer is tied."""
    make = lambda: models.llama(tied=False)  # noqa: E731
    one, two = saved(make(), tmp_path / "one", SOME), saved(make(), tmp_path / "two", OTHERS, seed=2)
    same = saved(make(), tmp_path / "same", SOME[:1], seed=3)
    edgepeft.export(make(), tmp_path / "b", bits=32, adapters={"one": one}, quick=True, train=False)
    model = peft.PeftModel.from_pretrained(make(), str(one)).eval()
    model.load_adapter(str(two), "two")
    model.base_model.set_adapter(["default", "two"])
    with edgepeft.load(tmp_path / "b") as device:
        assert differs(device, {"one": 1.0, two: 1.0}, logits(model)) <= 1e-4
        with pytest.raises(AdapterError, match="cannot be mixed"):
            device.forward(models.batch().arrays, adapter={"one": 1.0, same: 1.0})


def test_a_trained_adapter_has_the_copy_that_peft_writes_of_a_tied_layer(tmp_path: Path) -> None:
    """So PEFT misses nothing when it opens the folder, and warns of nothing, which would be an error here."""
    make = lambda: models.llama(tied=True)  # noqa: E731
    path = saved(make(), tmp_path / "a", SOME)
    edgepeft.export(make(), tmp_path / "b", bits=32, adapters={"a": path}, quick=True, verify=False)
    records = [{"input_ids": [3, 7, 44, 3, 7, 44, 3, 7], "labels": [3, 7, 44, 3, 7, 44, 3, 7]}] * 20
    with edgepeft.load(tmp_path / "b", memory_budget="2GiB") as device:
        device.adapt(records, tmp_path / "out", adapter="a", steps=8, learning_rate=1e-2)
        model = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out")).eval()
        assert differs(device, tmp_path / "out", logits(model)) <= 1e-4
    before, after = load_adapter(path), load_adapter(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    assert after.config["token_indices"] == SOME
    assert all(not np.array_equal(before.tensors[key], after.tensors[key]) for key in before.tensors)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys.*lm_head.trainable_tokens_delta")
def test_onnxruntimes_own_format_keeps_them(tmp_path: Path) -> None:
    """Alone and beside a LoRA; the copy that PEFT has of a tied layer's is not in that format."""
    make = lambda: models.llama(tied=True)  # noqa: E731
    alone = saved(make(), tmp_path / "alone", SOME)
    settings = {"r": 2, "target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
    beside = models.save_adapter(make(), tmp_path / "beside", 1, trainable_token_indices=OTHERS, **settings)
    edgepeft.export(
        make(), tmp_path / "b", bits=32, adapters={"alone": alone, "beside": beside}, quick=True, train=False
    )
    with edgepeft.load(tmp_path / "b") as device:
        for name in ("alone", "beside"):
            opened = open_bundle(tmp_path / "b")
            file, again = tmp_path / f"{name}.onnx_adapter", tmp_path / f"{name}2"
            write_onnx_adapter(opened, opened.adapter(name), file)
            save_adapter(read_onnx_adapter(opened, file), again)
            (expected,) = device.forward(models.batch().arrays, adapter=name).values()
            assert differs(device, again, expected) == 0.0
            assert differs(device, again, logits(peft.PeftModel.from_pretrained(make(), str(again)))) <= 1e-4


def test_a_lora_and_a_dora_have_axes_of_their_own(tmp_path: Path) -> None:
    """Of different ranks, in the decoder's graph, which has the former's packed."""
    make = lambda: models.llama(tied=True)  # noqa: E731
    settings = {"target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
    paths = {
        "lora": models.save_adapter(make(), tmp_path / "lora", 1, r=2, **settings),
        "dora": models.save_adapter(
            make(), tmp_path / "dora", 1, r=5, use_dora=True, target_modules=["down_proj"]
        ),
    }
    manifest = edgepeft.export(make(), tmp_path / "b", bits=32, adapters=paths, quick=True, train=False)
    assert manifest.decoder is not None
    assert manifest.verification is not None
    assert manifest.verification["decoder_outputs"].keys() >= {"adapter 'lora'", "adapter 'dora'"}


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    make = lambda: models.llama(tied=True)  # noqa: E731
    path = saved(make(), tmp_path / "a", SOME)
    edgepeft.export(make(), tmp_path / "b", bits=32, adapters={"a": path}, quick=True, verify=False)
    with (
        edgepeft.load(tmp_path / "b", memory_budget="2GiB") as device,
        pytest.raises(AdapterError, match=r"has to say which they are.*token_indices"),
    ):
        device.adapt([{"text": "a"}] * 8, tmp_path / "out", method="trainable_tokens")
    untied = saved(
        models.llama(tied=False), tmp_path / "two", SOME, target_modules=["embed_tokens", "lm_head"]
    )
    with pytest.raises(AdapterError, match=r"has rows of lm_head, model\.embed_tokens: edgepeft replaces"):
        load_adapter(untied)
    file = path / "adapter_config.json"
    settings = json.loads(file.read_text())
    for tokens, message in (
        ([0, 3, 3, 44, 300], "expected different tokens"),
        ([0, 3, -1, 44, 300], "expected different tokens"),
        ([3, 7], r"are \[5, 64\], its configuration names 2 tokens"),
    ):
        file.write_text(json.dumps(settings | {"token_indices": tokens}))
        with pytest.raises(AdapterError, match=message):
            load_adapter(path)


def test_a_tied_layer_with_a_bias_is_refused(tmp_path: Path) -> None:
    """PEFT computes it without the bias there."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(**models.SIZES, max_position_embeddings=64, initializer_range=0.2)
    ).eval()
    path = saved(model, tmp_path / "a", SOME, task_type=None)
    again = transformers.BertForMaskedLM(model.config)
    with pytest.raises(ExportError, match="tied to the embedding and has a bias, which PEFT leaves out"):
        edgepeft.export(again, tmp_path / "b", bits=32, adapters={"a": path}, quick=True)
