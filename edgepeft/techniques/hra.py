"""HRA: a chain of reflections of what a linear module reads.

    y = x (H₁ … H_r)ᵀ Wᵀ + b        Hᵢ = I - 2 uᵢ uᵢᵀ / ‖uᵢ‖²

`hra_u` `[in_features, r]` has the vectors, in the graphs as in PEFT's file; zeros leave the module exactly as
it is. Two equal reflections one behind the other are none, as which a fresh adapter begins. Chains that are
active together have no sum, and PEFT scales none.

Source: arXiv 2405.17484; `peft.tuners.hra`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter_settings import check_bias, check_number
from ..errors import AdapterError
from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Tensors, difference, uniform

NAME, VECTORS = "hra", "hra_u"
_KEY = f".{VECTORS}"
_RANK = 8  # PEFT's default


def new_slot(module: str, in_features: int, rank: int) -> Slot:
    """A slot on a linear module `[in_features] -> […]`."""
    key = f"{PREFIX}{module}{_KEY}"
    vectors = SlotTensor(VECTORS, key, key, (in_features, rank), transposed=False, trains=True, neutral=ZEROS)
    return Slot(NAME, LINEAR, module, (vectors,))


class Hra(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "HRA", "HRA"
    inert = "every two reflections of it are equal"
    suffixes = (_KEY,)
    bias_of_targets = "hra_only"

    def problem(self, slot: Slot) -> str | None:
        shape = slot.tensors[0].shape if slot.tensors else ()
        sizes = [size for size in shape if isinstance(size, int) and size > 0]
        if len(shape) != 2 or len(sizes) != 2:
            return f"has a tensor of shape {list(shape)}, expected two sizes"
        return difference(slot, new_slot(slot.module, sizes[0], sizes[1]))

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        if config.get("apply_GS", False) is not False:
            raise AdapterError(
                f"{origin}: apply_GS={config['apply_GS']!r} is not supported: train the adapter without it, "
                "or merge it"
            )
        check_bias(config, self.bias_of_targets, origin)
        check_number(origin, "r", config.get("r", _RANK), integer=True)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        rank = config.get("r", _RANK)
        for key, value in tensors.items():
            if self.owns(key) and (value.ndim != 2 or value.shape[1] != rank):
                raise AdapterError(
                    f"{origin}: tensor {key} is {list(value.shape)}, expected [in_features, {rank}]"
                )
        return super().check(config, tensors, origin)

    def settings(self, adapter: Held, module: str) -> dict[str, int]:
        return {"r": self.rank(adapter.tensors, module)}

    def rank(self, tensors: Tensors, module: str) -> int:
        tensor = tensors.get(f"{PREFIX}{module}{_KEY}")
        return 0 if tensor is None else int(tensor.shape[1])

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: every vector twice; of an odd number, each drawn for itself."""
        del size, read_weight
        in_features, rank = slot.tensor(VECTORS).sized(0)
        if rank % 2:
            return {slot.input(VECTORS): uniform(rng, (in_features, rank))}
        return {slot.input(VECTORS): np.repeat(uniform(rng, (in_features, rank // 2)), 2, axis=1)}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With the slots' rank."""
        rank = slots[0].tensor(VECTORS).sized(0)[1] if slots else size
        return {"r": rank, "apply_GS": False, "init_weights": True}

    def has_effect(self, adapter: Held) -> bool:
        vectors = [value for key, value in adapter.tensors.items() if self.owns(key)]
        return any(
            value.shape[1] % 2 == 1 or bool((value[:, 0::2] != value[:, 1::2]).any()) for value in vectors
        )


TECHNIQUE = Hra()
