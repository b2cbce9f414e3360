"""A transformers model with fewer tokens: rows of its embedding and its output layer, and the numbers of
tokens in its configurations.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from edgepeft.errors import ExportError

from ..quantize.table_weight import StoredWeight
from ..scratch import CHUNK_VALUES, spooled
from ..sources.tied_weights import canonical_names, vocabulary_tables

#: Settings that hold one token or several, as every setting that ends so.
_TOKENS = ("_token_id", "_token_ids")
#: Settings that say what is not to be written: a token that is not there is not written.
_UNWANTED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
#: Of BART and those that were made like it: a number for every token, `[1, tokens]`.
_BIAS_BUFFER = "final_logits_bias"


def token_rows(model: Any) -> int:
    """Tokens that both the embedding and the output layer have a row for; 0 where a model has neither."""
    return min((len(table) for table in vocabulary_tables(model)), default=0)


def table_names(model: Any) -> set[str]:
    """All names of the parameters that have a row for every token."""
    shared = _tables(model)
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in shared}


def named_tokens(model: Any, rows: int) -> set[int]:
    """Tokens below `rows` that a model's settings name, which have to stay; also those in front of the
    padding where that is what positions are counted from (RoBERTa)."""
    found: set[int] = set()
    for config in _configs(model):
        for key, value in vars(config).items():
            if key.endswith(_TOKENS):
                found |= {token for token in _listed(value) if isinstance(token, int)}
    tables = _tables(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight not in tables and module.padding_idx:
            found |= set(range(module.padding_idx))
    return {token for token in found if 0 <= token < rows}


def pick_tokens(model: Any, kept: Sequence[int]) -> None:
    """Leave a model with the tokens `kept`, numbered by their places there.

    Parameters are replaced, not written to; shared ones stay shared.
    """
    rows, new = torch.tensor(kept), {old: index for index, old in enumerate(kept)}
    tables, before = _tables(model), token_rows(model)
    picked = {
        table: torch.nn.Parameter(_picked_rows(table.detach(), rows), requires_grad=False) for table in tables
    }
    configs = list(_configs(model))
    for module in model.modules():
        has_table = False
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in picked:
                setattr(module, name, picked[parameter])
                has_table = True
        for size in ("num_embeddings", "out_features"):
            if has_table and hasattr(module, size):
                setattr(module, size, len(kept))
        if getattr(module, "vocab_size", None) == before:
            module.vocab_size = len(kept)
        if isinstance(padding := getattr(module, "padding_idx", None), int):
            module.padding_idx = new.get(padding)
    if (bias := getattr(model, _BIAS_BUFFER, None)) is not None:
        setattr(model, _BIAS_BUFFER, bias[:, rows])
    for config in configs:
        _renumber(config, new)


class PickedRows(Mapping[str, StoredWeight]):
    """Weights that are quantized already, some of them with fewer rows; each is read when it is asked for.

    Args:
        weights: all of them, by state-dict key.
        names: of those that have a row for every token.
        kept: the rows that these keep, in order.

    Raises:
        ExportError: when such a weight is asked for whose rows cannot be taken alone.
    """

    def __init__(self, weights: Mapping[str, StoredWeight], names: set[str], kept: Sequence[int]) -> None:
        self._weights = weights
        self._names = names
        self._kept = np.asarray(kept)

    def __getitem__(self, name: str) -> StoredWeight:
        weight = self._weights[name]
        if name not in self._names:
            return weight
        try:
            return weight.with_rows(self._kept)
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def quantized_tables(model: Any, quantized: Mapping[str, StoredWeight]) -> set[str]:
    """Names of those of the quantized weights that have a row for every token."""
    canonical = canonical_names(model)
    return {canonical[name] for name in table_names(model)} & quantized.keys()


def _tables(model: Any) -> set[torch.nn.Parameter]:
    """The embedding's weight, and the output layer's with its bias."""
    found = set(vocabulary_tables(model))
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return found | ({bias} if isinstance(bias, torch.nn.Parameter) else set())


def _picked_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    step = max(1, CHUNK_VALUES * len(table) // table.numel())
    return spooled((len(rows), *table.shape[1:]), table.dtype, (table[part] for part in rows.split(step)))


def _configs(model: Any) -> Iterator[Any]:
    """Every configuration of a model, and of how it generates, once."""
    owned = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in owned if isinstance(config, transformers.PreTrainedConfig)]
    found = [*configs, *(config.get_text_config() for config in configs)]
    if (generation := getattr(model, "generation_config", None)) is not None:
        found.append(generation)
    yield from {id(config): config for config in found}.values()


def _renumber(config: Any, new: Mapping[int, int]) -> None:
    """Numbers of tokens that the vocabulary did not have (other models' defaults) stay beyond it."""
    for key, value in list(vars(config).items()):
        if key == "vocab_size":
            config.vocab_size = len(new)
        elif value is None:
            continue
        elif key.endswith(_TOKENS):
            setattr(config, key, _renumbered(value, new))
        elif key == "bad_words_ids":
            words = [word for word in value if all(token in new for token in word)]
            setattr(config, key, [[new[token] for token in word] for word in words] or None)
        elif key in _UNWANTED:
            setattr(config, key, [new[token] for token in value if token in new] or None)


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_renumbered(item, new) for item in value]
    return new.get(value, value) if isinstance(value, int) else value


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
