"""How a model's folder says that texts are generated, for the manifest."""

from pathlib import Path
from typing import Any

import transformers

from edgepeft.bundle.manifest import GenerationSettings

from .base import ModelSource
from .settings import GENERATION, check_refused

#: transformers' `top_k` where tokens are drawn and nobody says how many to draw from.
_TOP_K = 50


def generation_config(source: ModelSource) -> Any:
    """transformers' `GenerationConfig` of a language model; None where there is none."""
    if not source.task.endswith("-generation"):
        return None
    if (model := getattr(source, "model", None)) is not None and hasattr(model, "generation_config"):
        return model.generation_config
    folder = Path(getattr(source, "path", Path())).parent
    if not (folder / GENERATION).is_file():
        return None
    return transformers.GenerationConfig.from_pretrained(folder)


def end_tokens(source: ModelSource) -> tuple[int, ...]:
    """Tokens that end an answer: the generation's own, or the model's where there is nothing about that."""
    found = generation_config(source)
    return _tokens(getattr(source.config if found is None else found, "eos_token_id", None), source)


def generation_settings(source: ModelSource) -> GenerationSettings:
    """What the manifest says of it.

    Raises:
        ExportError: something is set that the runtime does not do.
    """
    found = generation_config(source)
    if found is None:
        return GenerationSettings()
    draws = bool(found.do_sample)
    check_refused(source.name, GENERATION, vars(found).items(), sampling=draws)
    given = {name: getattr(found, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    temperature = 1.0 if given["temperature"] is None else float(given["temperature"])
    top_k = _TOP_K if given["top_k"] is None and draws else given["top_k"]
    first = found.forced_bos_token_id
    return GenerationSettings(
        temperature=temperature if draws else 0.0,
        top_k=top_k or None,
        top_p=None if given["top_p"] in (None, 1) else float(given["top_p"]),
        min_p=float(given["min_p"]) if given["min_p"] else None,
        repetition_penalty=float(found.repetition_penalty or 1),
        stop_strings=_texts(found.stop_strings),
        suppress_tokens=_tokens(found.suppress_tokens, source),
        begin_suppress_tokens=_tokens(found.begin_suppress_tokens, source),
        forced_bos_token_id=None if first is None else next(iter(_tokens(first, source)), None),
        forced_eos_token_ids=_tokens(found.forced_eos_token_id, source),
        min_length=found.min_length or 0,
        min_new_tokens=found.min_new_tokens or 0,
        no_repeat_ngram_size=found.no_repeat_ngram_size or 0,
        # A word with a token that is not in the vocabulary is never written.
        bad_words_ids=tuple(
            tokens
            for word in found.bad_words_ids or ()
            if len(tokens := _tokens(word, source)) == len(word) > 0
        ),
    )


def _tokens(value: Any, source: ModelSource) -> tuple[int, ...]:
    """Tokens as a configuration writes them (one, several or none), those that the vocabulary has:
    configurations carry other models' defaults."""
    listed = value if isinstance(value, list | tuple) else [value]
    size = int(source.config.vocab_size)
    return tuple(token for token in listed if isinstance(token, int) and 0 <= token < size)


def _texts(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
