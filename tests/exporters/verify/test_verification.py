"""What a folder says, with the code that reads it taken out: no bundle is written. With it, one is."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from onnxruntime.transformers.float16 import convert_float_to_float16

import edgepeft
from edgepeft.bundle.manifest import GenerationSettings, TextSettings
from edgepeft.errors import AdapterError, EdgePeftError, ExportError, VerificationError
from edgepeft.exporters import pipeline
from edgepeft.exporters.decoder import cache_in_place
from edgepeft.exporters.sources import loading, model_info, onnx_graph, tokenizer
from edgepeft.exporters.sources.generation_settings import generation_config
from edgepeft.exporters.techniques import prepare, stored_modules
from edgepeft.runtime.text import chat

from .. import models
from ..sharing import Shared
from ..sources.test_settings import (
    GENERATION,
    POSITIONS,
    SENTENCES,
    TOKENIZER,
    change,
    sentence_folder,
    words,
)

Patch = Callable[[pytest.MonkeyPatch], None]
TOOLS = "{{ tools|tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
TODAY = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"


def _ends_of_the_model(source: Any) -> tuple[int, ...]:
    return (source.config.eos_token_id,)


def _unset(source: Any) -> GenerationSettings:
    generation_config(source)
    return GenerationSettings()


def _fails(form: str) -> str:
    raise ValueError(f"{form}: 'strftime_now' is undefined")


def _without_tools(template: chat.ChatTemplate, messages: Any, where: str, _: object = None) -> str:
    return template.render(messages, where, prompt=True)


def _names(id2label: dict[int, str], count: int) -> tuple[str, ...]:
    return tuple(id2label.values())[:count]


def set_to(place: Any, name: str, value: Any) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(place, name, value)


#: A model, what its folder says, what is taken out, and whether it is found without comparing outputs.
FOLDERS: dict[str, tuple[str, Callable[[Path], object], Patch, bool]] = {
    "ends of generation_config": (
        "llama",
        lambda folder: change(folder, GENERATION, eos_token_id=[2, 300]),
        set_to(model_info, "end_tokens", _ends_of_the_model),
        False,
    ),
    "suppressed tokens": (
        "llama",
        lambda folder: change(folder, GENERATION, suppress_tokens=list(range(100, 320))),
        set_to(model_info, "generation_settings", _unset),
        False,
    ),
    "penalty": (
        "llama",
        lambda folder: change(folder, GENERATION, repetition_penalty=0.1),
        set_to(model_info, "generation_settings", _unset),
        False,
    ),
    "draws": (
        "llama",
        lambda folder: change(folder, GENERATION, do_sample=True, temperature=0.3, top_k=5),
        set_to(model_info, "generation_settings", _unset),
        False,
    ),
    "longest answer": (
        "llama",
        lambda folder: change(folder, GENERATION, eos_token_id=2, min_new_tokens=9),
        set_to(model_info, "generation_settings", _unset),
        False,
    ),
    "truncation side": (
        "classifier",
        lambda folder: change(folder, TOKENIZER, truncation_side="left"),
        set_to(tokenizer, "TextSettings", lambda **_: TextSettings()),
        True,
    ),
    "token types": (
        "classifier",
        lambda folder: change(folder, TOKENIZER, model_input_names=["input_ids", "attention_mask"]),
        set_to(tokenizer, "TextSettings", lambda **_: TextSettings()),
        True,
    ),
    "special tokens in a text": (
        "classifier",
        lambda folder: change(folder, TOKENIZER, split_special_tokens=True),
        set_to(tokenizer, "TextSettings", lambda **_: TextSettings()),
        True,
    ),
    "the tokenizer's class": (
        "classifier",
        lambda folder: change(folder, TOKENIZER, tokenizer_class="BertTokenizer", do_lower_case=True),
        set_to(tokenizer, "_unless_equal", lambda data, _: data),
        True,
    ),
    "lower case": (
        "encoder",
        lambda folder: change(sentence_folder(folder), SENTENCES, do_lower_case=True),
        set_to(tokenizer, "lower_case", lambda _: None),
        True,
    ),
    "the time": (
        "llama",
        lambda folder: change(folder, TOKENIZER, chat_template=TODAY),
        set_to(chat, "_now", _fails),
        True,
    ),
    "tools": (
        "llama",
        lambda folder: change(folder, TOKENIZER, chat_template=TOOLS),
        set_to(chat.ChatTemplate, "prompt", _without_tools),
        True,
    ),
    "a gap in id2label": (
        "classifier",
        lambda folder: change(folder, "config.json", id2label={"0": "a", "1": "b", "3": "d"}),
        set_to(model_info, "label_names", _names),
        True,
    ),
}


@pytest.fixture(scope="module")
def saved(shared: Shared) -> Callable[[str], Path]:
    """A model's folder, with a tokenizer that knows the letters of what verification reads."""
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: models.llama(tied=True),
        "classifier": models.bert_classifier,
        "encoder": models.bert_encoder,
    }

    def write(name: str, folder: Path) -> None:
        makers[name]().save_pretrained(str(folder))
        known = ["the", "The", "Fox", "fox", "over", "lazy", "Yes.", "Really?"]
        words(*known).save_pretrained(str(folder))

    return lambda name: shared(f"verification/{name}", lambda folder: write(name, folder))


#: Found by the same check as others, so they are tried by hand and in the long run.
AGAIN = {"penalty", "longest answer", "token types", "special tokens in a text"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in AGAIN)) for name in FOLDERS]
)
def test_a_setting_that_is_not_honoured_is_found(
    name: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, say, take_out, cheap = FOLDERS[name]
    folder = Path(shutil.copytree(saved(model), tmp_path / "model"))
    say(folder)
    options: dict[str, Any] = {"bits": 32, "train": False, "verify": not cheap}
    edgepeft.export(str(folder), tmp_path / "right", **options)
    take_out(monkeypatch)
    with pytest.raises(VerificationError):
        edgepeft.export(str(folder), tmp_path / "wrong", **options)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("roberta", "usable_positions"),
        pytest.param("mpnet", "usable_positions", marks=pytest.mark.slow),
        pytest.param("longrope", "keep_angles", marks=pytest.mark.slow),
    ],
)
def test_a_context_that_is_too_long_is_found(
    name: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = POSITIONS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    monkeypatch.setattr(loading, function, lambda _: None)
    with pytest.raises(VerificationError, match="tokens"):
        edgepeft.export(model, tmp_path / "wrong", bits=32, train=False)


def _adapter(
    folder: Path, *, tied: bool = True, resize: int = 0, embeddings: bool = False, **config: Any
) -> Path:
    model = models.llama(tied=tied)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.save_adapter(
            model, folder, 3, embeddings=embeddings, r=2, task_type="CAUSAL_LM", **config
        )


#: What an adapter stores, and what is taken out.
ADAPTERS: dict[str, tuple[dict[str, Any], Patch]] = {
    "an output layer that was tied": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        set_to(prepare, "prepare_stored", lambda adapters, *_: dict(adapters)),
    ),
    "a saved embedding": (
        {"tied": False, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        set_to(
            pipeline,
            "without_unused",
            lambda adapter, *_: adapter.with_tensors(
                {k: v for k, v in adapter.tensors.items() if "embed" not in k}, adapter.origin
            ),
        ),
    ),
    "a LoRA on the output layer": (
        {"target_modules": ["q_proj", "lm_head"]},
        set_to(
            pipeline,
            "without_unused",
            lambda adapter, *_: adapter.with_tensors(
                {k: v for k, v in adapter.tensors.items() if "lm_head" not in k}, adapter.origin
            ),
        ),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "a saved embedding")) for name in ADAPTERS],
)
def test_what_an_adapter_stores_and_is_left_out_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, take_out = ADAPTERS[name]
    folder = _adapter(tmp_path / "adapter", **config)
    take_out(monkeypatch)
    model = models.llama(tied=config.get("tied", True))
    with pytest.raises(VerificationError, match="logits with adapter 'a' differs from PyTorch's"):
        edgepeft.export(model, tmp_path / "wrong", bits=32, adapters={"a": folder}, train=False)


def test_a_vocabulary_that_is_not_resized_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _adapter(
        tmp_path / "adapter", tied=False, resize=330, embeddings=True, target_modules=["q_proj"]
    )
    monkeypatch.setattr(stored_modules, "_resize_vocabulary", lambda *_: None)
    with pytest.raises(AdapterError, match=r"\[330, 64\] in the adapter, \[320, 64\] in this bundle"):
        edgepeft.export(
            models.llama(tied=False), tmp_path / "wrong", bits=32, adapters={"a": folder}, train=False
        )


@pytest.mark.parametrize(
    ("declared", "error", "match"),
    [
        (None, ExportError, "Cannot handle batch sizes > 1 if no padding token is defined"),
        (-1, VerificationError, "logits of a row differs by .* with padding behind it"),
    ],
)
def test_a_classifier_that_reads_padding_is_found(
    declared: int | None, error: type[Exception], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a token that pads, or whose token is none."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**models.SIZES, max_position_embeddings=64, num_labels=3)
    vars(config)["pad_token_id"] = declared
    monkeypatch.setattr(loading, "pool_by_mask", lambda _: None)
    with pytest.raises(error, match=match):
        edgepeft.export(
            transformers.LlamaForSequenceClassification(config), tmp_path / "wrong", bits=32, train=False
        )


@pytest.mark.parametrize("hidden_size", [40, pytest.param(32, marks=pytest.mark.slow)])
def test_heads_that_no_kernel_takes_are_found(
    hidden_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 10 and of 8."""
    sizes = {**models.SIZES, "hidden_size": hidden_size}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=64)
    monkeypatch.setattr(cache_in_place, "_takes_size", lambda _: True)
    with pytest.raises(EdgePeftError, match=r"head_size .* be a multiple of"):
        edgepeft.export(transformers.LlamaForCausalLM(config), tmp_path / "wrong", bits=32, train=False)


def test_a_file_of_sixteen_bits_that_is_not_widened_is_found(
    files: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(convert_float_to_float16(onnx.load(files("bert-script")), keep_io_types=True), path)
    monkeypatch.setattr(onnx_graph, "widen_floats", lambda _: False)
    with pytest.raises(EdgePeftError, match=r"Type \(tensor\(float16\)\) of output arg"):
        edgepeft.export(path, tmp_path / "wrong", bits=32, train=False)
