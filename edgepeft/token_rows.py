"""Rows of the embedding of tokens that an adapter replaces: PEFT's trainable tokens.

They are adapters of their own (`TRAINABLE_TOKENS`), or go with a LoRA (`trainable_token_indices`), whose file
has another key for them. A layer that is tied to the embedding has the same rows; of the former kind PEFT's
file has them once more under its name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import AdapterError
from .slots import PREFIX
from .techniques.base import FloatArray, Tensors

ROWS = ".trainable_tokens_delta"
"""How the key of the rows ends, `[tokens, width]`."""
_IN_LORA = ".token_adapter.trainable_tokens_delta"
_TIED = ".tied_trainable_tokens_delta"
OPTION, OPTION_OF_LORA = "token_indices", "trainable_token_indices"
LARGEST = 2**24
"""Tokens from here on have no exact float32."""


def owns_rows(key: str) -> bool:
    """Whether the key is one of rows of the embedding, or of their copy for a tied layer."""
    return key.endswith((ROWS, _TIED))


def modules_with_rows(tensors: Tensors) -> tuple[str, ...]:
    """The embeddings whose rows an adapter with these tensors replaces."""
    return tuple(key[len(PREFIX) : -len(ROWS)] for key in tensors if key.endswith(ROWS))


def token_indices(config: Mapping[str, Any]) -> list[int] | None:
    """The tokens whose rows an adapter with this configuration has, in their order; None: it has no rows."""
    chosen = config.get(OPTION_OF_LORA) if OPTION not in config else config[OPTION]
    if isinstance(chosen, dict):
        (chosen,) = chosen.values()
    return chosen or None


def check_token_indices(config: Mapping[str, Any], origin: str) -> None:
    """
    Raises:
        AdapterError: they are no different tokens of one embedding.
    """
    name = OPTION if OPTION in config else OPTION_OF_LORA
    chosen = config.get(name)
    if isinstance(chosen, dict) and len(chosen) > 1:
        raise AdapterError(
            f"{origin}: {name} names {', '.join(map(str, chosen))}: edgepeft replaces rows of the embedding "
            "of tokens alone, with the layers that are tied to it"
        )
    tokens = next(iter(chosen.values())) if isinstance(chosen, dict) and chosen else chosen or []
    if (
        not isinstance(tokens, list)
        or not all(type(token) is int and 0 <= token < LARGEST for token in tokens)
        or len(set(tokens)) != len(tokens)
    ):
        raise AdapterError(f"{origin}: {name} is {str(chosen)[:80]}, expected different tokens of the model")


def check_rows(config: Mapping[str, Any], tensors: Tensors, origin: str) -> None:
    """
    Raises:
        AdapterError: the rows are not those of the tokens that the configuration names.
    """
    tokens, modules = token_indices(config), modules_with_rows(tensors)
    if tensors and len(modules) != (tokens is not None):
        raise AdapterError(
            f"{origin}: has rows of {len(modules)} embeddings ({', '.join(modules) or 'none'}), its "
            f"configuration names {len(tokens or ())} tokens: expected those of one embedding"
        )
    for module in modules:
        shape = tensors[f"{PREFIX}{module}{ROWS}"].shape
        if len(shape) != 2 or shape[0] != len(tokens or ()):
            raise AdapterError(
                f"{origin}: module {module}: the rows of its tokens are {list(shape)}, its configuration "
                f"names {len(tokens or ())} tokens"
            )


def rows_from_file(config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
    """The tensors of PEFT's file with one key for rows, and with another for their copies.

    Raises:
        AdapterError: there are rows of several embeddings.
    """
    found = {
        key.removesuffix(_IN_LORA) + ROWS if key.endswith(_IN_LORA) else key: value
        for key, value in tensors.items()
    }
    modules = modules_with_rows(found)
    if len(modules) < 2:
        return found
    targets = config.get("target_modules")
    names = tuple([targets] if isinstance(targets, str) else targets or ["embed_tokens"])
    own = [module for module in modules if module.endswith(names)]
    first = found[f"{PREFIX}{own[0] if own else modules[0]}{ROWS}"]
    if len(own) != 1 or not all(
        np.array_equal(first, found[f"{PREFIX}{module}{ROWS}"]) for module in modules
    ):
        raise AdapterError(
            f"{origin}: has rows of {', '.join(modules)}: edgepeft replaces rows of the embedding of tokens "
            "alone, with the layers that are tied to it"
        )
    copies = {f"{PREFIX}{module}{ROWS}" for module in modules if module not in own}
    return {key.removesuffix(ROWS) + _TIED if key in copies else key: value for key, value in found.items()}


def rows_to_file(tensors: Tensors, *, of_lora: bool) -> dict[str, FloatArray]:
    """The other way; copies are of the rows as they are now."""
    rows = next((value for key, value in tensors.items() if key.endswith(ROWS)), None)
    written: dict[str, FloatArray] = {}
    for key, value in tensors.items():
        if key.endswith(_TIED) and rows is not None:
            written[key.removesuffix(_TIED) + ROWS] = rows.copy()
        elif key.endswith(ROWS) and of_lora:
            written[key.removesuffix(ROWS) + _IN_LORA] = value
        else:
            written[key] = value
    return written
