"""What the manifest says of the base model."""

from collections.abc import Iterable
from typing import Any

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import ModelInfo

from .sources.base import ModelSource

#: Names PEFT gives to the heads of sequence classifiers and always saves.
HEADS = ("classifier", "score")


def model_info(source: ModelSource) -> ModelInfo:
    """Sizes, special tokens and labels, from the transformers configuration."""
    config = source.config
    eos = getattr(config, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [eos]
    labels: tuple[str, ...] = ()
    if source.task == "text-classification":
        labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return ModelInfo(
        name=source.name,
        model_type=config.model_type,
        architecture=source.architecture,
        max_length=source.max_length,
        vocab_size=config.vocab_size,
        pad_token_id=_token(getattr(config, "pad_token_id", None), config),
        bos_token_id=_token(getattr(config, "bos_token_id", None), config),
        eos_token_ids=tuple(token for end in ends if (token := _token(end, config)) is not None),
        labels=labels,
        embedding_size=config.hidden_size if source.task == "feature-extraction" else None,
        num_layers=config.num_hidden_layers,
    )


def saved_module_names(source: ModelSource, adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """Modules whose parameters stay inputs: a classifier's head, and what the adapters replace whole.

    PEFT saves every module whose name ends with one of `modules_to_save`; so does this.
    """
    endings = list(HEADS) if source.task == "text-classification" else []
    for adapter in adapters:
        endings += adapter.config.get("modules_to_save") or []
    return tuple(name for name in source.module_names() if name.endswith(tuple(endings)))


def default_targets(source: ModelSource) -> list[str]:
    """Linear modules that take a LoRA unless told otherwise: all but the head and what is saved whole."""
    saved = tuple(f"{name}." for name in saved_module_names(source, ()))
    return [name for name in source.linear_names() if not f"{name}.".startswith(saved)]


def _token(token: int | None, config: Any) -> int | None:
    """The token, or None where the vocabulary has no such: configurations carry other models' defaults."""
    return token if token is not None and 0 <= token < config.vocab_size else None
