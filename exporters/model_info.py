"""What the manifest says of the base model."""

from collections.abc import Iterable

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import ModelInfo

from .sources.loading import Source

#: Names PEFT gives to the heads of sequence classifiers and always saves.
HEADS = ("classifier", "score")


def model_info(source: Source) -> ModelInfo:
    """Sizes, special tokens and labels, from the transformers configuration."""
    config = source.config
    eos = getattr(config, "eos_token_id", None)
    labels: tuple[str, ...] = ()
    if source.task == "text-classification":
        labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return ModelInfo(
        name=source.name,
        model_type=config.model_type,
        architecture=type(source.model).__name__,
        max_length=source.max_length,
        vocab_size=config.vocab_size,
        pad_token_id=_token(getattr(config, "pad_token_id", None)),
        bos_token_id=_token(getattr(config, "bos_token_id", None)),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
        labels=labels,
        embedding_size=config.hidden_size if source.pooling is not None else None,
        num_layers=config.num_hidden_layers,
    )


def saved_module_names(source: Source, adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """Modules whose parameters stay inputs: a classifier's head, and what the adapters replace whole."""
    names = [name for name, _ in source.model.named_children() if name in HEADS]
    named = names if source.task == "text-classification" else []
    for adapter in adapters:
        named += [name for name in adapter.config.get("modules_to_save") or [] if name not in HEADS]
        named += [name for name in names if name in (adapter.config.get("modules_to_save") or [])]
    return tuple(dict.fromkeys(named))


def _token(token: int | None) -> int | None:
    return token if token is None or token >= 0 else None
