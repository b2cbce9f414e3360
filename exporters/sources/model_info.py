"""What the manifest says of the base model."""

from collections.abc import Iterable, Mapping
from typing import Any

from edgepeft.adapters import PREFIX, Adapter
from edgepeft.bundle.manifest import ModelInfo
from edgepeft.bundle.validation import TOKENLESS
from edgepeft.errors import ExportError

from .base import ModelSource
from .generation_settings import end_tokens, generation_config, generation_settings
from .model_files import mask_token_id
from .tasks import CLASSIFICATION

#: Names PEFT gives to the heads of sequence classifiers and always saves.
HEADS = ("classifier", "score")


def model_info(source: ModelSource, loss: str | None = None) -> ModelInfo:
    """Sizes, special tokens and labels, from the transformers configuration."""
    config = source.config
    labels: tuple[str, ...] = ()
    if source.task in CLASSIFICATION:
        labels = label_names(config.id2label, config.num_labels)
    return ModelInfo(
        name=source.name,
        model_type=config.model_type,
        architecture=source.architecture,
        max_length=source.max_length,
        vocab_size=_vocab_size(source),
        whole_vocab_size=getattr(source, "whole_vocab_size", None),
        pad_token_id=_token(getattr(config, "pad_token_id", None), source),
        bos_token_id=_token(getattr(config, "bos_token_id", None), source),
        eos_token_ids=end_tokens(source) if takes_tokens(source) else (),
        labels=labels,
        embedding_size=config.hidden_size if source.task == "feature-extraction" else None,
        num_layers=_num_layers(config),
        loss=loss,
        problem_type=source.problem_type,
        decoder_start_token_id=_decoder_start(source),
        min_length=source.min_length,
        prompts={} if source.pooling is None else dict(source.pooling.prompts),
        default_prompt=None if source.pooling is None else source.pooling.default_prompt,
        mask_token_id=mask_token_id(source.tokenizer_files) if source.task == "fill-mask" else None,
        text=source.text_settings,
        generation=generation_settings(source),
    )


def label_names(id2label: Mapping[Any, Any] | None, count: int) -> tuple[str, ...]:
    """A name for each of `count` classes: that of the configuration, or transformers' own, `LABEL_1`, for one
    that it leaves out. Of a name that it gives twice, the second has its class behind it."""
    named = {int(index): str(name) for index, name in (id2label or {}).items()}
    names: list[str] = []
    for index in range(count):
        name = named.get(index, f"LABEL_{index}")
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return tuple(names)


def saved_module_names(source: ModelSource, adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """Modules whose parameters stay inputs: a classifier's head, and what the adapters replace whole.

    Behind them, names of single parameters: biases whose modules are kept otherwise.
    """
    adapters = tuple(adapters)
    heads = HEADS if source.task in CLASSIFICATION else ()
    biases = {key for each in adapters for key in each.bias_keys}
    stored = {
        key.removeprefix(PREFIX).rpartition(".")[0]
        for each in adapters
        for key in set(each.saved_keys) - set(each.bias_keys)
    }
    modules = tuple(
        name
        for name in source.module_names()
        if name.endswith(heads) or name in stored or any(matches_saved(name, each) for each in adapters)
    )
    return (*modules, *sorted(key.removeprefix(PREFIX) for key in biases))


def matches_saved(module: str, adapter: Adapter) -> bool:
    """Whether PEFT saves a module whole: its name ends with one of `modules_to_save`."""
    return module.endswith(tuple(adapter.config.get("modules_to_save") or ()))


def default_targets(source: ModelSource) -> list[str]:
    """Linear modules that take a LoRA unless told otherwise: all but the head, what is saved whole and what a
    LoRA has no effect on."""
    called = source.called_linears()
    saved = tuple(f"{name}." for name in saved_module_names(source, ()))
    return [name for name in source.linear_names() if name in called and not f"{name}.".startswith(saved)]


def _token(token: int | None, source: ModelSource) -> int | None:
    """The token, or None where the vocabulary has no such: configurations carry other models' defaults."""
    return token if token is not None and 0 <= token < _vocab_size(source) else None


def _vocab_size(source: ModelSource) -> int:
    """Tokens the model takes; 0 for images and recordings, whose configurations may count other things."""
    return int(source.config.vocab_size) if takes_tokens(source) else 0


def takes_tokens(source: ModelSource) -> bool:
    """Whether the model reads texts, and not images or recordings."""
    return source.task not in TOKENLESS


def _num_layers(config: Any) -> int:
    """Layers, or blocks of all stages."""
    return int(getattr(config, "num_hidden_layers", None) or sum(getattr(config, "depths", ())))


def _decoder_start(source: ModelSource) -> int | None:
    """The token that an encoder-decoder's own shift puts in front of the labels.

    Raises:
        ExportError: the configuration has none.
    """
    if source.task != "text2text-generation":
        return None
    token = _token(getattr(source.config, "decoder_start_token_id", None), source)
    if token is None:
        raise ExportError(
            f"{source.name}: its configuration has no usable decoder_start_token_id, which the decoder's "
            "input begins with: set it before exporting"
        )
    found = generation_config(source)
    begins = None if found is None else found.decoder_start_token_id
    if begins not in (None, token):
        raise ExportError(
            f"{source.name}: generation_config.json has decoder_start_token_id {begins}, config.json "
            f"{token}, and an answer is begun as it is learned: give both the same"
        )
    return token
