"""What methods of small matrices have in common whose product is added to a weight: LoHa, LoKr."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..adapter_settings import check_rank, ranks_and_alphas
from ..errors import AdapterError
from ..slots import PREFIX, ZEROS, Slot, SlotTensor
from .base import RANK, SCALING, FloatArray, Held, PeftTechnique, Tensors


class Factors(PeftTechnique):
    """Small matrices whose product is added to a linear module's weight, times `alpha / r`.

    Their sizes are fixed at export (`Slot.settings`); the factor is a tensor of the slot, of one value, 0
    where no adapter has anything there.
    """

    weighted = SCALING
    refused: ClassVar[Mapping[str, str]] = {}
    """Ends of keys that are no linear module's, and what they belong to."""

    @abc.abstractmethod
    def features(self, slot: Slot) -> tuple[int, int]:
        """What the slot's module reads and makes: in_features and out_features."""

    def weight_shape(self, slot: Slot) -> tuple[int, ...]:
        return self.features(slot)[::-1]

    def owns(self, key: str) -> bool:
        return key.endswith((*self.suffixes, *self.refused))

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        stems = [key.rpartition(".")[0] for key in tensors if key.endswith(self.suffixes)]
        return tuple(stem.removeprefix(PREFIX) for stem in dict.fromkeys(stems))

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        check_rank(config, "alpha", origin)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        for key, value in tensors.items():
            for suffix, meaning in self.refused.items():
                if key.endswith(suffix):
                    raise AdapterError(f"{origin}: tensor {key} belongs to {meaning}, which is not supported")
            if key.endswith(self.suffixes) and value.ndim != 2:
                raise AdapterError(
                    f"{origin}: tensor {key} has {value.ndim} axes, edgepeft runs {self.title} on linear "
                    "modules (2 axes)"
                )
        given = ranks_and_alphas(config, "alpha", self.modules(tensors), origin)
        return {module: alpha / rank for module, (rank, alpha) in given.items()}

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        found = super().values(slot, adapter)
        if not found:
            return {}
        return found | {slot.input(SCALING): np.full(1, adapter.scaling(slot.module), np.float32)}

    def has_effect(self, adapter: Held) -> bool:
        """Whether no factor is all zeros, and the scaling is not zero, on one of the modules."""
        for module in self.modules(adapter.tensors):
            stem = f"{PREFIX}{module}."
            own = [value for key, value in adapter.tensors.items() if key.startswith(stem) and self.owns(key)]
            if all(value.any() for value in own) and adapter.scaling(module) != 0:
                return True
        return False

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With alpha = r; the ranks are the slots'."""
        ranks = {slot.module: int(slot.settings[RANK]) for slot in slots}
        rank = max(ranks.values(), default=size)
        others = {module: own for module, own in ranks.items() if own != rank}
        return {
            "r": rank,
            "alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "use_effective_conv2d": False,
            "init_weights": True,
        }


def scaling_tensor(module: str) -> SlotTensor:
    """The factor of a slot on a module."""
    return SlotTensor(
        SCALING, f"{PREFIX}{module}.{SCALING}", None, (1,), transposed=False, trains=False, neutral=ZEROS
    )
