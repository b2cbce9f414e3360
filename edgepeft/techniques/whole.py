"""A parameter that an adapter replaces whole: PEFT's `modules_to_save`, such as a classification head, and
the biases that train beside a LoRA (`bias="all"`, `bias="lora_only"`).

It does not add to what the base has, so a mixture is defined only where it is unambiguous: one adapter that
carries it is used whole; several are averaged if they are equal or if their weights sum to 1.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import AdapterError
from ..slots import PARAMETER, PREFIX, WHOLE, Slot, SlotTensor
from .base import FloatArray, Held, ReadWeight, Technique, Tensors, difference


def new_slot(module: str, parameter: str, shape: Sequence[int], default: str) -> Slot:
    """A slot on a module's parameter; `default` is the base's own in `weights.bin`."""
    key = f"{PREFIX}{module}.{parameter}"
    tensor = SlotTensor(parameter, key, key, tuple(shape), transposed=False, trains=True, neutral=default)
    return Slot(WHOLE, PARAMETER, module, (tensor,))


def biases(slots: Iterable[Slot]) -> list[Slot]:
    """Those slots of whole parameters that are a bias whose module keeps what else it has: PEFT's `bias`."""
    found = [slot for slot in slots if slot.technique == WHOLE]
    named = Counter(slot.module for slot in found)
    return [slot for slot in found if slot.tensors[0].name == "bias" and named[slot.module] == 1]


class Whole(Technique):
    """See the module."""

    name, title = WHOLE, "a saved module"
    apart = "is replaced whole by an adapter (modules_to_save), so the rows of a batch cannot differ in it"

    def problem(self, slot: Slot) -> str | None:
        if len(slot.tensors) != 1:
            return f"has {len(slot.tensors)} tensors, expected 1"
        (tensor,) = slot.tensors
        sizes = [size for size in tensor.shape if isinstance(size, int)]
        if len(sizes) != len(tensor.shape) or tensor.default is None:
            return f"is {list(tensor.shape)} with the default {tensor.neutral!r}, expected sizes and a weight"
        return difference(slot, new_slot(slot.module, tensor.name, sizes, tensor.default))

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        (tensor,) = slot.tensors
        value = adapter.tensors.get(tensor.input)
        return {} if value is None else {tensor.input: np.ascontiguousarray(value)}

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not weighted:
            return self.neutral(slot, read_weight)
        (name,) = slot.inputs
        first = weighted[0][0][name]
        if all(np.array_equal(first, values[name]) for values, _ in weighted[1:]):
            return {name: first}
        total = sum(weight for _, weight in weighted)
        if abs(total - 1) > 1e-6:
            raise AdapterError(
                f"module {slot.module} is replaced by {len(weighted)} of the mixed adapters, whose weights "
                f"sum to {total:g}: give these weights that sum to 1, or mix only one adapter that carries it"
            )
        if len({values[name].shape for values, _ in weighted}) > 1:
            raise AdapterError(
                f"module {slot.module} has more labels in one of the mixed adapters than in another: mix "
                "adapters that know the same"
            )
        mixed = sum((weight * values[name] for values, weight in weighted), np.zeros(first.shape, np.float32))
        return {name: np.ascontiguousarray(mixed, dtype=np.float32)}


TECHNIQUE = Whole()
