"""IA³: a vector that multiplies what a linear module makes, bias included, or what a feed-forward one reads.

In the graphs the vector is `[1, out_features]`, or `[1, in_features]` where the module is one of PEFT's
`feedforward_modules`. In the inference graph it may also be `[batch, 1, …, features]`, with as many axes as
the activations have: every row of the batch then has a vector of its own. Adapters that are active together
multiply, as in PEFT; a weight other than 1 has no meaning there.

Source: arXiv 2205.05638; `peft.tuners.ia3`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import AdapterError
from ..slots import LINEAR, ONES, PREFIX, Slot, SlotTensor
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference

NAME, FEEDFORWARD = "ia3", "feedforward"
VECTOR = "ia3_l"
_KEY = f".{VECTOR}"


def new_slot(module: str, features: int, activation_axes: int, *, feedforward: bool) -> Slot:
    """A slot on a linear module: on the features that it reads (`feedforward`), or on those that it makes."""
    key = f"{PREFIX}{module}{_KEY}"
    vector = SlotTensor(
        VECTOR, key, key, (1, features), transposed=not feedforward, trains=True, neutral=ONES
    )
    return Slot(NAME, LINEAR, module, (vector,), {FEEDFORWARD: feedforward}, activation_axes)


class IA3(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "IA³", "IA3"
    inert = "every ia3_l is ones"
    suffixes = (_KEY,)
    by_row = (VECTOR,)

    def problem(self, slot: Slot) -> str | None:
        shape = slot.tensors[0].shape if len(slot.tensors) == 1 else ()
        feedforward = slot.settings.get(FEEDFORWARD)
        if len(shape) != 2 or not isinstance(shape[1], int) or not isinstance(feedforward, bool):
            return f"has {len(slot.tensors)} tensors and settings {slot.settings}, which are not IA³'s"
        expected = new_slot(slot.module, shape[1], slot.activation_axes, feedforward=feedforward)
        return difference(slot, expected)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        for key, value in tensors.items():
            if self.owns(key) and (value.ndim != 2 or 1 not in value.shape):
                raise AdapterError(
                    f"{origin}: tensor {key} is {list(value.shape)}, expected [features, 1] or [1, "
                    "features]: edgepeft runs IA³ on linear modules"
                )
        return super().check(config, tensors, origin)

    def settings(self, adapter: Held, module: str) -> Settings:
        """PEFT keeps the vector of a feed-forward module as a row, any other as a column."""
        return {FEEDFORWARD: adapter.tensors[f"{PREFIX}{module}{_KEY}"].shape[0] == 1}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        del size
        modules = [slot.module for slot in slots if slot.settings.get(FEEDFORWARD)]
        return {"feedforward_modules": modules, "fan_in_fan_out": False, "init_ia3_weights": True}

    def has_effect(self, adapter: Held) -> bool:
        return any(bool((value != 1).any()) for key, value in adapter.tensors.items() if self.owns(key))

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        name = slot.input(VECTOR)
        if len(weighted) < 2 or any(weight != 1 for _, weight in weighted):
            return super().mixed(slot, weighted, read_weight)
        vectors = [values[name] for values, _ in weighted]
        return {name: np.prod(np.stack(vectors), axis=0, dtype=np.float32)}

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not adapters or not slot.activation_axes:
            return super().rows(slot, adapters, weights, read_weight)
        ((name, vectors),) = self.stacked(slot, adapters, weights, read_weight).items()
        return {name: vectors.reshape(len(vectors), *(1,) * (slot.activation_axes - 2), -1)}


TECHNIQUE = IA3()
