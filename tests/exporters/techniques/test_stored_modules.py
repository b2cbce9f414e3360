"""What PEFT stores whole, asked to and unasked, against PEFT on the same base.

Nothing here is verified by the export itself unless a test says so.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.bundle.reader import open_bundle

from .. import models, task_models

Build = Callable[[], transformers.PreTrainedModel]
IDS = np.arange(24).reshape(2, 12) % 300 + 3


def tied() -> transformers.PreTrainedModel:
    return models.llama(tied=True)


def untied() -> transformers.PreTrainedModel:
    return models.llama(tied=False)


def t5_tied() -> transformers.PreTrainedModel:
    return task_models.t5()


def phi() -> transformers.PreTrainedModel:
    """Its output layer has a bias."""
    torch.manual_seed(0)
    config = transformers.PhiConfig(**models.SIZES, max_position_embeddings=64, initializer_range=0.2)
    model = transformers.PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def bert_mask() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**models.SIZES, max_position_embeddings=64, initializer_range=0.2)
    return transformers.BertForMaskedLM(config).eval()


def save(build: Build, folder: Path, *, embeddings: Any = False, **config: Any) -> Path:
    """An adapter with random factors and noise on whatever it saves whole."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(build(), peft.LoraConfig(r=4, **config))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            elif "modules_to_save" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
        wrapped.save_pretrained(str(folder), save_embedding_layers=embeddings)
    return folder


def keys(folder: Path) -> set[str]:
    """What is stored beside the factors, without PEFT's prefix."""
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return {key.removeprefix("base_model.model.") for key in list(file.keys()) if ".lora_" not in key}


def expected(base: transformers.PreTrainedModel, folder: Path, **inputs: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        return np.asarray(model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits)


def check(
    build: Build, folder: Path, bundle: Path, bits: int = 32, base: Build | None = None, **options: Any
) -> None:
    """The bundle's logits with the adapter are PEFT's, and without it the base's."""
    edgepeft.export(build(), bundle, bits=bits, adapters={"a": folder}, **options)
    inputs = {"input_ids": IDS}
    if "decoder_input_ids" in {item.name for item in open_bundle(bundle).manifest.graphs["inference"].inputs}:
        inputs["decoder_input_ids"] = IDS[:, :5]
    model = (base or build)()
    with edgepeft.load(bundle) as device:
        got = device.forward(inputs, adapter="a")["logits"]
        plain = device.forward(inputs)["logits"]
    if base is None:
        with torch.no_grad():
            own = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
        close(plain, own)
    close(got, expected(model, folder, **inputs))
    assert np.abs(got - plain).max() > 1e-2


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * scale)


GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
UNVERIFIED: dict[str, Any] = {"train": False, "verify": False}


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tied, {"modules_to_save": ["lm_head"]}),
        pytest.param(tied, {"modules_to_save": ["embed_tokens"]}, marks=pytest.mark.slow),
        (tied, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (tied, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (untied, {"modules_to_save": ["embed_tokens", "norm"]}),
        pytest.param(
            models.gpt2,
            {"modules_to_save": ["wte", "mlp.c_fc"], "target_modules": ["c_attn"], "fan_in_fan_out": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            models.gpt2,
            {"modules_to_save": ["lm_head", "wpe"], "target_modules": ["c_attn"], "fan_in_fan_out": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            t5_tied, {"modules_to_save": ["embed_tokens"], "target_modules": ["q"]}, marks=pytest.mark.slow
        ),
        pytest.param(
            t5_tied,
            {"modules_to_save": ["lm_head", "shared"], "target_modules": ["q"]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            bert_mask, {"modules_to_save": ["decoder"], "target_modules": ["query"]}, marks=pytest.mark.slow
        ),
        (bert_mask, {"modules_to_save": ["word_embeddings"], "target_modules": ["query"]}),
    ],
    ids=lambda value: "-".join(value["modules_to_save"]) if isinstance(value, dict) else value.__name__,
)
def test_a_module_that_is_saved_whole_leaves_the_one_that_shared_its_weights(
    build: Build, config: dict[str, Any], tmp_path: Path
) -> None:
    """An output layer that is trained leaves the tied embedding as it was, and the other way round."""
    folder = save(build, tmp_path / "a", **{"target_modules": ["q_proj"], **config})
    check(build, folder, tmp_path / "bundle", **UNVERIFIED)


@pytest.mark.parametrize("embeddings", [False, "auto"])
@pytest.mark.parametrize("build", [tied, pytest.param(untied, marks=pytest.mark.slow), phi])
def test_a_lora_on_the_output_layer(build: Build, embeddings: Any, tmp_path: Path) -> None:
    """PEFT stores the layer below it as well unless told not to; the decoder has the LoRA too."""
    target = ["q_proj", "lm_head"]
    folder = save(build, tmp_path / "a", target_modules=target, embeddings=embeddings)
    parts = {f"lm_head.base_layer.{name}" for name, _ in build().lm_head.named_parameters()}
    assert keys(folder) == (parts if embeddings else set())
    check(build, folder, tmp_path / "bundle", **UNVERIFIED)
    assert not keys(tmp_path / "bundle" / "adapters" / "a"), "the base's own weights are not stored twice"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(build(), str(folder)).eval()
        wanted = model.generate(input_ids=torch.from_numpy(IDS[:1]), max_new_tokens=8, do_sample=False)
    with edgepeft.load(tmp_path / "bundle") as device:
        assert (device.manifest.decoder is None) == (build is phi)
        assert device.generate_ids(IDS[0].tolist(), adapter="a", max_new_tokens=8) == wanted[0, 12:].tolist()
        # The same folder from outside: what it holds of the base has the base's shape.
        close(
            device.forward({"input_ids": IDS}, adapter=folder)["logits"],
            device.forward({"input_ids": IDS}, adapter="a")["logits"],
        )


@pytest.mark.parametrize("bits", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_verification_and_training_with_a_tied_output_layer(bits: int, tmp_path: Path) -> None:
    """Outputs, loss and gradients of a LoRA on it, of the layer saved whole, and of an embedding stored
    unasked; PEFT overwrites the base with the last, so what is verified after it needs the base again."""
    adapters = {
        "unasked": save(tied, tmp_path / "unasked", target_modules=["q_proj"], embeddings=True),
        "lora": save(tied, tmp_path / "lora", target_modules=["v_proj", "lm_head"], embeddings="auto"),
    }
    first = edgepeft.export(tied(), tmp_path / "one", bits=bits, adapters=adapters)
    assert not first.slots_of("whole")
    assert first.verification["gradients"]["lora"]["smallest_cosine"] > 0.9999
    saved = {"head": save(tied, tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])}
    second = edgepeft.export(tied(), tmp_path / "two", bits=bits, adapters=saved | adapters)
    assert [module.module for module in second.slots_of("whole")] == ["lm_head"]
    assert second.verification["gradients"]["head"]["smallest_cosine"] > 0.9999


def resized(build: Build, rows: int) -> Build:
    def make() -> transformers.PreTrainedModel:
        model = build()
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model.eval()

    return make


@pytest.mark.parametrize(
    ("build", "rows", "config"),
    [
        pytest.param(tied, 304, {}, marks=pytest.mark.slow),
        (untied, 331, {}),
        (tied, 331, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        pytest.param(untied, 304, {"modules_to_save": ["embed_tokens", "lm_head"]}, marks=pytest.mark.slow),
        pytest.param(untied, 331, {"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.slow),
        pytest.param(tied, 304, {"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.slow),
    ],
)
def test_a_vocabulary_that_was_resized(
    build: Build, rows: int, config: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT stores the embeddings unasked. The base may be given as it was before it was resized."""
    trained = resized(build, rows)
    folder = save(trained, tmp_path / "a", embeddings=True, **{"target_modules": ["q_proj"], **config})
    (folder / "tokenizer.json").write_text("{}")
    check(build, folder, tmp_path / "bundle", base=trained, **UNVERIFIED)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.model.vocab_size == rows
    assert bool(manifest.slots_of("whole")) == ("modules_to_save" in config), "what is the base's is frozen"
    assert (tmp_path / "bundle" / "tokenizer.json").read_text() == "{}", "the adapter's names the new tokens"


def test_an_embedding_that_was_trained_and_is_stored_unasked(tmp_path: Path) -> None:
    """It overwrites the base's, and where that is tied, the output layer."""

    def trained() -> transformers.PreTrainedModel:
        model = tied()
        model.model.embed_tokens.weight.data += 0.2
        return model

    folder = save(trained, tmp_path / "a", target_modules=["q_proj"], embeddings=True)
    check(tied, folder, tmp_path / "bundle")
    assert [m.module for m in open_bundle(tmp_path / "bundle").manifest.slots_of("whole")] == ["lm_head"]


def test_a_copy_in_sixteen_bits_is_the_bases(tmp_path: Path) -> None:
    folder = save(
        lambda: tied().bfloat16(), tmp_path / "a", target_modules=["q_proj", "lm_head"], embeddings=True
    )
    assert any("base_layer" in key for key in keys(folder))
    manifest = edgepeft.export(tied(), tmp_path / "bundle", bits=32, adapters={"a": folder}, **UNVERIFIED)
    assert not manifest.slots_of("whole")


def refuse(match: str, build: Build, tmp_path: Path, **adapters: Path) -> None:
    with pytest.raises(edgepeft.AdapterError, match=match):
        edgepeft.export(build(), tmp_path / "bundle", bits=32, adapters=adapters, **UNVERIFIED)
    assert not (tmp_path / "bundle").exists()


def test_another_base_below_a_lora_is_named(tmp_path: Path) -> None:
    def other() -> transformers.PreTrainedModel:
        model = untied()
        model.lm_head.weight.data += 1
        return model

    folder = save(other, tmp_path / "a", target_modules=["lm_head"], embeddings="auto")
    refuse(
        r"was trained over another lm_head\.weight than that of LlamaForCausalLM", untied, tmp_path, a=folder
    )


def test_two_vocabularies_do_not_go_into_one_bundle(tmp_path: Path) -> None:
    folders = {
        name: save(resized(untied, rows), tmp_path / name, target_modules=["q_proj"], embeddings=True)
        for name, rows in (("a", 330), ("b", 340))
    }
    refuse("vocabulary of 340 tokens, .* one of 330: export each", untied, tmp_path, **folders)


def test_a_saved_module_that_the_model_has_not(tmp_path: Path) -> None:
    folder = save(untied, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    refuse(
        r"q_proj is no linear|lm_head\.weight is saved in the adapter, but .* has none",
        models.bert_classifier,
        tmp_path,
        a=folder,
    )


def test_an_adapter_from_outside_with_embeddings_says_what_to_do(tmp_path: Path, tied_llama: Path) -> None:
    folder = save(tied, tmp_path / "a", target_modules=["q_proj"], embeddings=True)
    with edgepeft.load(tied_llama) as device, pytest.raises(edgepeft.AdapterError) as caught:
        device.forward({"input_ids": IDS}, adapter=folder)
    assert "save_embedding_layers=False if that was not trained" in str(caught.value)
    asked = save(tied, tmp_path / "b", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with edgepeft.load(tied_llama) as device, pytest.raises(edgepeft.AdapterError) as caught:
        device.forward({"input_ids": IDS}, adapter=asked)
    assert "export the base together with this adapter" in str(caught.value)
    assert "save_embedding_layers" not in str(caught.value)


def test_what_pefts_wrapper_holds_besides_is_not_read(tmp_path: Path) -> None:
    """All of an embedding that is saved whole: the base's own, and the adapter's twice."""
    folder = save(
        untied, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"], embeddings=True
    )
    assert "lm_head.original_module.weight" in keys(folder)
    loaded = load_adapter(folder)
    assert {key.removeprefix("base_model.model.") for key in loaded.saved_keys} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    check(untied, folder, tmp_path / "bundle", **UNVERIFIED)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "tied", "saved"],
)
def test_what_the_device_learns_opens_in_peft(config: dict[str, Any], tmp_path: Path) -> None:
    """Trained from such an adapter, on a tied model."""
    folder = save(tied, tmp_path / "a", embeddings="auto", **{"target_modules": ["q_proj"], **config})
    edgepeft.export(tied(), tmp_path / "bundle", bits=32, adapters={"a": folder}, verify=False)
    records = [{"input_ids": ((np.arange(10) * 7 + 3 * (n % 2)) % 300).tolist()} for n in range(24)]
    with edgepeft.load(tmp_path / "bundle") as device:
        before = device.forward({"input_ids": IDS}, adapter="a")["logits"]
        options = {"adapter": "a", "steps": 6, "seq_len": 10, "learning_rate": 5e-3}
        device.adapt(records, tmp_path / "new", **options)
        got = device.forward({"input_ids": IDS}, adapter=tmp_path / "new")["logits"]
    assert np.abs(got - before).max() > 1e-3
    close(got, expected(tied(), tmp_path / "new", input_ids=IDS))


@pytest.mark.parametrize(
    ("build", "targets"), [(t5_tied, ["q", "lm_head"]), (bert_mask, ["query", "decoder"])], ids=["t5", "bert"]
)
def test_a_lora_on_the_tied_output_layer_of_an_encoder(
    build: Build, targets: list[str], tmp_path: Path
) -> None:
    folder = save(build, tmp_path / "a", target_modules=targets)
    assert any(module.endswith(targets[1]) for module in load_adapter(folder).modules)
    check(build, folder, tmp_path / "bundle", **UNVERIFIED)
