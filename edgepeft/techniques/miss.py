"""MiSS: one small matrix beside a linear module, which all parts of what that reads share.

    y += (sum of x's parts of r features) M        M [r, out_features]

The last part is filled up with zeros. With `init_weights="mini"` the matrix is `[r, mini_r]`, repeated along
the outputs. In the graphs it is as in PEFT's file. Adapters mix exactly: what they add is a sum. In the
inference graph the rows of a batch may have matrices of their own, `[batch, r, …]`.

Source: arXiv 2409.15371; `peft.tuners.miss`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter_settings import check_bias, check_number
from ..errors import AdapterError
from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import RANK, FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference

NAME, BLOCK = "miss", "miss_block"
MINI, OUT_FEATURES = "mini_r", "out_features"
"""Settings: the columns that are repeated, 0 where none are; and what the module makes."""
_KEY = f".{BLOCK}"
_RANK, _MINI = 64, 1  # PEFT's defaults
# Matrices that one batch's rows may have are multiplied with `[batch, sequence, r]`.
_AXES = 3


def new_slot(module: str, settings: Settings, activation_axes: int) -> Slot:
    """A slot on a linear module."""
    key = f"{PREFIX}{module}{_KEY}"
    shape = int(settings[RANK]), int(settings[MINI] or settings[OUT_FEATURES])
    block = SlotTensor(BLOCK, key, key, shape, transposed=False, trains=True, neutral=ZEROS)
    return Slot(NAME, LINEAR, module, (block,), dict(settings), activation_axes)


class Miss(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "MiSS", "MISS"
    inert = "every miss_block is zero"
    suffixes = (_KEY,)
    weighted = BLOCK
    by_row = (BLOCK,)
    bias_of_targets = "MiSS_only"

    def problem(self, slot: Slot) -> str | None:
        settings = slot.settings
        sizes = [settings.get(name) for name in (RANK, OUT_FEATURES, MINI)]
        rank, made, mini = (size if type(size) is int else -1 for size in sizes)
        if rank < 1 or made < 1 or mini < 0 or (mini and made % mini):
            return f"has settings {settings}, which are not MiSS's"
        return difference(slot, new_slot(slot.module, settings, slot.activation_axes))

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        start = config.get("init_weights", True)
        if not (isinstance(start, bool) or start == "mini"):
            raise AdapterError(
                f"{origin}: init_weights={start!r} is not supported: 'bat' multiplies the base's weight, "
                "which is quantized here: train the adapter without it, or merge it"
            )
        check_bias(config, self.bias_of_targets, origin)
        check_number(origin, "r", config.get("r", _RANK), integer=True)
        check_number(origin, MINI, config.get(MINI, _MINI), integer=True)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        rank = config.get("r", _RANK)
        mini = config.get(MINI, _MINI) if config.get("init_weights") == "mini" else None
        for key, value in tensors.items():
            if self.owns(key) and (value.ndim != 2 or value.shape != (rank, mini or value.shape[1])):
                raise AdapterError(
                    f"{origin}: tensor {key} is {list(value.shape)}, expected [{rank}, "
                    f"{mini or 'out_features'}]"
                )
        return super().check(config, tensors, origin)

    def settings(self, adapter: Held, module: str) -> Settings:
        """What the module makes, the graph says."""
        rows, columns = adapter.tensors[f"{PREFIX}{module}{_KEY}"].shape
        return {RANK: int(rows), MINI: int(columns) if adapter.config.get("init_weights") == "mini" else 0}

    def rank(self, tensors: Tensors, module: str) -> int:
        tensor = tensors.get(f"{PREFIX}{module}{_KEY}")
        return 0 if tensor is None else int(tensor.shape[0])

    def fit(self, slot: Slot, adapter: Held) -> None:
        super().fit(slot, adapter)
        mini = self.settings(adapter, slot.module)[MINI]
        if mini != slot.settings[MINI]:
            raise AdapterError(
                f"{adapter.origin}: module {slot.module} has {mini} repeated columns in the adapter, "
                f"{slot.settings[MINI]} in this bundle: export the base together with this adapter"
            )

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With the slots' sizes."""
        first = slots[0].settings if slots else {RANK: size, MINI: 0}
        mini = int(first[MINI])
        return {
            "r": int(first[RANK]),
            MINI: mini or _MINI,
            "miss_dropout": 0.0,
            "init_weights": "mini" if mini else True,
        }

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if len(weighted) < 2:
            return super().mixed(slot, weighted, read_weight)
        name = slot.input(BLOCK)
        zeros = np.zeros(slot.tensor(BLOCK).sized(0), np.float32)
        return {name: sum((np.float32(weight) * values[name] for values, weight in weighted), zeros)}

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not adapters or slot.activation_axes != _AXES:
            return super().rows(slot, adapters, weights, read_weight)
        return self.stacked(slot, adapters, weights, read_weight)


TECHNIQUE = Miss()
