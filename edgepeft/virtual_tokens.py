"""Virtual tokens: what a prompt method puts in front of every text.

In the graphs they are token ids behind the vocabulary's, so they may stand anywhere in a row: texts are
padded, cached and read in pieces as ever, and every row of a batch may have its own. Each slot has a range of
ids to itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from .adapters import Adapter
from .errors import AdapterError
from .slots import PREFIX, SIZE, Slot
from .techniques.base import FloatArray, Held, PeftTechnique, ReadWeight, Tensors

FIRST_ID = "first_id"
"""A slot's setting: the token id of its first virtual token."""
RANGE = 2**20
"""Ids that a slot has to itself."""
KEY = "prompt_embeddings"
"""PEFT's key of all that it stores of a prompt method."""
_FILE_PREFIX = "base_model."
COUNT = "num_virtual_tokens"
"""PEFT's option that says how many they are."""

Ids: TypeAlias = npt.NDArray[np.int64]


class VirtualTokens(PeftTechnique):
    """A technique whose adapters have virtual tokens: the size of its slots.

    PEFT wraps no module for it, so in its file the keys of saved modules have another prefix.
    """

    apart = "has one prompt for all rows"
    shared = (KEY,)
    place: ClassVar[int]
    """Of its range of ids among those of all such techniques, from 0."""
    predicts: ClassVar[bool] = True
    """Whether the last virtual token says what the first of the text is, and is told in training."""

    def from_file(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
        del config, origin
        return {
            key if key in self.shared else PREFIX + key.removeprefix(_FILE_PREFIX): value
            for key, value in tensors.items()
        }

    def to_file(self, tensors: Tensors) -> dict[str, FloatArray]:
        return {
            key if key in self.shared else _FILE_PREFIX + key.removeprefix(PREFIX): value
            for key, value in tensors.items()
        }

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        count = config.get(COUNT)
        if type(count) is not int or not 0 < count <= RANGE:
            raise AdapterError(f"{origin}: {COUNT} is {count!r}, expected 1 to {RANGE:,}")
        if config.get("num_transformer_submodules") not in (1, None):
            raise AdapterError(
                f"{origin}: {self.title} of an encoder-decoder is not supported: train a LoRA instead"
            )

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        for key, value in tensors.items():
            if self.owns(key) and (value.ndim != 2 or len(value) != config[COUNT]):
                raise AdapterError(
                    f"{origin}: tensor {key} is {list(value.shape)}, expected [{config[COUNT]}, width], as "
                    f"{COUNT} says"
                )
        return {}

    def config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """What PEFT's configuration of so many virtual tokens, in these slots, has of the technique's."""
        width = int(slots[0].tensors[0].shape[-1]) if slots else None
        return {COUNT: size, "num_transformer_submodules": 1, "token_dim": width}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        return self.config(size, slots)

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        """With the most that a slot has."""
        del origin
        sizes = [self.size(slot, tensors) for slot, tensors in values]
        return self.config(max(sizes, default=0), [slot for slot, _ in values])

    def has_effect(self, adapter: Held) -> bool:
        """Where there are any: a text with something in front is another one."""
        return self.count(adapter.tensors) > 0

    def count(self, tensors: Tensors) -> int:
        """How many virtual tokens there are, by PEFT's keys."""
        return next((len(value) for key, value in tensors.items() if self.owns(key)), 0)

    def cache(self, slot: Slot, values: Tensors) -> dict[str, FloatArray]:
        """What the slot's values are in a key/value cache, `[heads, virtual tokens, head_dim]` by the cache's
        names; nothing where they have to be read."""
        del slot, values
        return {}

    def rank(self, tensors: Tensors, module: str) -> int:
        return self.count(tensors) if module in self.modules(tensors) else 0

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """Those of all adapters, one behind the other; which are a row's, its token ids say."""
        for row in weights:
            self.mixed(
                slot,
                [(item, weight) for item, weight in zip(adapters, row, strict=True) if weight],
                read_weight,
            )
        if not adapters:
            return self.neutral(slot, read_weight)
        found: dict[str, FloatArray] = {}
        for tensor in slot.tensors:
            values = [item[tensor.input] for item in adapters]
            if SIZE in tensor.shape:
                found[tensor.input] = np.concatenate(values, axis=tensor.shape.index(SIZE))
            elif all(np.array_equal(values[0], value) for value in values):
                found[tensor.input] = values[0]
            else:
                raise AdapterError(
                    f"module {slot.module} {self.apart}: run the adapters that differ there one at a time"
                )
        return found


def count_virtual(adapter: Adapter) -> int:
    """How many an adapter has."""
    technique = adapter.technique
    return technique.count(adapter.tensors) if isinstance(technique, VirtualTokens) else 0


def token_ids(slot: Slot, first: int, count: int) -> Ids:
    """Ids of a slot's virtual tokens, from the `first` of those it is fed on."""
    begin = int(slot.settings[FIRST_ID]) + first
    return np.arange(begin, begin + count)
