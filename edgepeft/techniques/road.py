"""RoAd: pairs of what a linear module makes, bias included, rotated and scaled.

    y₀' = a₀ cos θ₀ · y₀ - a₀ sin θ₀ · y₁        y₁' = a₁ cos θ₁ · y₁ + a₁ sin θ₁ · y₀

A group of outputs is split in halves, whose elements are pairs. `road_theta` and `road_alpha` have one angle
and scale for a pair (`road_1`), one for each element (`road_2`) or one for each of the four factors
(`road_4`); in the graphs they are as in PEFT's file. Angles 0 and scales 1 leave the module exactly as it is.
In the inference graph the rows of a batch may have their own, `[batch, n]`. Rotations that are active
together have no sum, and PEFT scales none.

Source: arXiv 2409.00119; `peft.tuners.road`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter_settings import check_number
from ..errors import AdapterError
from ..slots import LINEAR, ONES, PREFIX, ZEROS, Slot, SlotTensor
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference

NAME = "road"
THETA, ALPHA = "road_theta", "road_alpha"
VARIANT, GROUP_SIZE = "variant", "group_size"
"""Settings, PEFT's own."""
FACTORS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Of the four factors of a pair, how many have an angle and a scale of their own."""
DEFAULT_VARIANT, DEFAULT_GROUP_SIZE = "road_1", 64  # PEFT's


def new_slot(module: str, out_features: int, settings: Settings, activation_axes: int) -> Slot:
    """A slot on a linear module `[…] -> [out_features]`."""
    size = out_features // 2 * FACTORS[str(settings[VARIANT])]

    def tensor(name: str, neutral: str) -> SlotTensor:
        key = f"{PREFIX}{module}.{name}"
        return SlotTensor(name, key, key, (size,), transposed=False, trains=True, neutral=neutral)

    tensors = tensor(THETA, ZEROS), tensor(ALPHA, ONES)
    return Slot(NAME, LINEAR, module, tensors, dict(settings), activation_axes)


class Road(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "RoAd", "ROAD"
    inert = "every angle is zero and every scale one"
    suffixes = (f".{THETA}", f".{ALPHA}")
    by_row = (THETA, ALPHA)

    def problem(self, slot: Slot) -> str | None:
        settings, shape = slot.settings, slot.tensors[0].shape if slot.tensors else ()
        group = settings.get(GROUP_SIZE)
        if settings.get(VARIANT) not in FACTORS or type(group) is not int or group < 2 or group % 2:
            return f"has settings {settings}, which are not RoAd's"
        if len(shape) != 1 or not isinstance(shape[0], int):
            return f"has a tensor of shape {list(shape)}, expected one axis"
        out_features = shape[0] * 2 // FACTORS[str(settings[VARIANT])]
        if out_features < 1 or out_features % group:
            return f"has {out_features} features in groups of {group}"
        return difference(slot, new_slot(slot.module, out_features, settings, slot.activation_axes))

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        if (variant := config.get(VARIANT, DEFAULT_VARIANT)) not in FACTORS:
            raise AdapterError(f"{origin}: variant is {variant!r}, expected one of {', '.join(FACTORS)}")
        group = config.get(GROUP_SIZE, DEFAULT_GROUP_SIZE)
        check_number(origin, GROUP_SIZE, group, integer=True)
        if group % 2:
            raise AdapterError(f"{origin}: group_size is {group}, expected an even number")

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        for key, value in tensors.items():
            if self.owns(key) and value.ndim != 1:
                raise AdapterError(f"{origin}: tensor {key} has {value.ndim} axes, expected 1")
        return super().check(config, tensors, origin)

    def settings(self, adapter: Held, module: str) -> Settings:
        del module
        config = adapter.config
        return {
            VARIANT: config.get(VARIANT, DEFAULT_VARIANT),
            GROUP_SIZE: config.get(GROUP_SIZE, DEFAULT_GROUP_SIZE),
        }

    def fit(self, slot: Slot, adapter: Held) -> None:
        super().fit(slot, adapter)
        self.fit_settings(slot, adapter, (VARIANT, GROUP_SIZE))

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With the slots' groups."""
        del size
        default = {VARIANT: DEFAULT_VARIANT, GROUP_SIZE: DEFAULT_GROUP_SIZE}
        return {"init_weights": True} | (dict(slots[0].settings) if slots else default)

    def has_effect(self, adapter: Held) -> bool:
        return any(
            bool((value != float(key.endswith(ALPHA))).any())
            for key, value in adapter.tensors.items()
            if self.owns(key)
        )

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not adapters or not slot.activation_axes:
            return super().rows(slot, adapters, weights, read_weight)
        return self.stacked(slot, adapters, weights, read_weight)


TECHNIQUE = Road()
