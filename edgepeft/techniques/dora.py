"""DoRA: a LoRA whose sum with the weight has rows of learned lengths.

    y = m / ‖W + s·BA‖ · (x (W + s·BA)ᵀ) + b

`A`, `B` and the scaling are those of `lora`; the magnitude `m` is `[out_features]`. Rank 0 and the lengths of
the stored weight's own rows, which `weights.bin` has, leave the module exactly as it is.

Source: arXiv 2402.09353; `peft.tuners.lora.dora`. PEFT's type of these adapters is LoRA's, with `use_dora`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import AdapterError
from ..slots import PREFIX, Slot, SlotTensor
from . import lora
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Technique, Tensors, difference

NAME, MAGNITUDE = "dora", "magnitude"
_MAGNITUDE = ".lora_magnitude_vector"


def new_slot(module: str, in_features: int, out_features: int, row_norms: str) -> Slot:
    """A slot on a linear module; `row_norms` are the lengths of its weight's rows in `weights.bin`."""
    key = f"{PREFIX}{module}{_MAGNITUDE}"
    magnitude = SlotTensor(
        MAGNITUDE, key, key, (out_features,), transposed=False, trains=True, neutral=row_norms
    )
    plain = lora.new_slot(module, in_features, out_features, 0)
    return replace(plain, technique=NAME, tensors=(*plain.tensors, magnitude))


class Dora(lora.Lora):
    """See the module."""

    name, title = NAME, "DoRA"
    apart = "has one length of its weight's rows for all rows of a batch, so these cannot differ in it"
    suffixes = (*lora.Lora.suffixes, _MAGNITUDE)
    by_row = ()

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("use_dora"))

    def problem(self, slot: Slot) -> str | None:
        by_name = {tensor.name: tensor for tensor in slot.tensors}
        if by_name.keys() != {lora.A, lora.B, lora.SCALING, MAGNITUDE}:
            return f"has the tensors {list(by_name)}, which are not DoRA's"
        sizes = (*by_name[lora.A].shape[:1], *by_name[MAGNITUDE].shape[:1])
        whole = [size for size in sizes if isinstance(size, int) and size > 0]
        norms = by_name[MAGNITUDE].default
        if len(whole) != 2 or norms is None:
            return f"has sizes {list(sizes)} and the magnitude {norms!r}, expected sizes and a weight"
        return difference(slot, new_slot(slot.module, whole[0], whole[1], norms))

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: a fresh LoRA, and the lengths of the stored weight's rows."""
        magnitude = slot.tensor(MAGNITUDE)
        norms = np.array(read_weight(magnitude.neutral), np.float32)
        return super().fresh(slot, size, rng, read_weight) | {magnitude.input: norms}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        return super().fresh_config(size, slots) | {"use_dora": True}

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """One adapter, with weight 1."""
        return Technique.mixed(self, slot, weighted, read_weight)

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        return Technique.rows(self, slot, adapters, weights, read_weight)

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        super().check_config({**config, "use_dora": False}, origin)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        PeftTechnique.check(self, config, tensors, origin)
        return super().check(
            config, {key: value for key, value in tensors.items() if not key.endswith(_MAGNITUDE)}, origin
        )

    def fit(self, slot: Slot, adapter: Held) -> None:
        super().fit(slot, adapter)
        magnitude = slot.tensor(MAGNITUDE)
        shape = adapter.tensors[magnitude.input].shape
        if shape != magnitude.shape:
            raise AdapterError(
                f"{adapter.origin}: module {slot.module}: its magnitude is {list(shape)} in the adapter, "
                f"{list(magnitude.shape)} in this bundle: the adapter was made for another base"
            )


TECHNIQUE = Dora()
