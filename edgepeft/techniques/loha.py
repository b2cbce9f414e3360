"""LoHa: the elementwise product of two low-rank ones beside a linear module.

    y += x ((w1_a w1_b) * (w2_a w2_b))ᵀ · alpha / r

In the graphs `w1_a`, `w2_a` are `[out_features, r]` and `w1_b`, `w2_b` `[r, in_features]`, as in PEFT's file.

Source: FedPara, arXiv 2108.06098; `peft.tuners.loha`.
"""

from typing import ClassVar

import numpy as np

from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import RANK, FloatArray, Held, ReadWeight, Settings, Tensors, difference, uniform
from .factors import Factors, scaling_tensor

NAME = "loha"
FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def new_slot(module: str, in_features: int, out_features: int, rank: int) -> Slot:
    """A slot on a linear module `[in_features] -> [out_features]`."""

    def factor(name: str) -> SlotTensor:
        key = f"{PREFIX}{module}.{name}"
        shape = (out_features, rank) if name.endswith("a") else (rank, in_features)
        return SlotTensor(name, key, key, shape, transposed=False, trains=True, neutral=ZEROS)

    return Slot(NAME, LINEAR, module, (*map(factor, FACTORS), scaling_tensor(module)), settings={RANK: rank})


class LoHa(Factors):
    """See the module."""

    name, title, peft_type = NAME, "LoHa", "LOHA"
    inert = "a factor of every product is zero"
    suffixes = tuple(f".{name}" for name in FACTORS)
    refused: ClassVar = {".hada_t1": "a LoHa on a convolution", ".hada_t2": "a LoHa on a convolution"}

    def features(self, slot: Slot) -> tuple[int, int]:
        return int(slot.tensor("hada_w1_b").shape[1]), int(slot.tensor("hada_w1_a").shape[0])

    def problem(self, slot: Slot) -> str | None:
        names = [tensor.name for tensor in slot.tensors]
        shapes = [tensor.shape for tensor in slot.tensors[: len(FACTORS)]]
        if names[: len(FACTORS)] != [*FACTORS] or any(
            len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape)
            for shape in shapes
        ):
            return f"has the tensors {names} of {[list(shape) for shape in shapes]}, which are no LoHa's"
        rank = int(slot.tensor("hada_w1_b").shape[0])
        return difference(slot, new_slot(slot.module, *self.features(slot), rank))

    def settings(self, adapter: Held, module: str) -> Settings:
        return {RANK: int(adapter.tensors[f"{PREFIX}{module}.hada_w1_b"].shape[0])}

    def rank(self, tensors: Tensors, module: str) -> int:
        tensor = tensors.get(f"{PREFIX}{module}.hada_w1_b")
        return 0 if tensor is None else int(tensor.shape[0])

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: `w2_b` zero, the others uniform."""
        del size, read_weight
        values = {tensor.name: uniform(rng, tensor.sized(0)) for tensor in slot.tensors if tensor.key}
        values["hada_w2_b"][:] = 0
        return {slot.input(name): value for name, value in values.items()}


TECHNIQUE = LoHa()
