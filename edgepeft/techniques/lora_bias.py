"""LoRA with a bias of its own: `y += (((x A) * scaling) B) + bias * bias_scaling`.

`A`, `B` and the scaling are those of `lora`; the bias is `[out_features]`, its scaling `[1]` the same factor
once. Adapters mix exactly: what their biases add is summed. In the inference graph the bias may also be
`[batch, 1, …, out_features]`, a row's own.

Source: `peft.tuners.lora`, where `lora_B` is a linear with a bias (`lora_bias=True`), LoRA's type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ..errors import AdapterError
from ..slots import PREFIX, ZEROS, Slot, SlotTensor
from . import lora
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Tensors, difference

NAME, BIAS, BIAS_SCALING = "lora_bias", "bias", "bias_scaling"
_BIAS = ".lora_B.bias"


def new_slot(module: str, in_features: int, out_features: int, activation_axes: int) -> Slot:
    """A slot on a linear module `[in_features] -> [out_features]`; see `Slot` for its axes."""
    key, factor = f"{PREFIX}{module}{_BIAS}", f"{PREFIX}{module}.{BIAS_SCALING}"
    bias = SlotTensor(BIAS, key, key, (out_features,), transposed=False, trains=True, neutral=ZEROS)
    scaling = SlotTensor(BIAS_SCALING, factor, None, (1,), transposed=False, trains=False, neutral=ZEROS)
    plain = lora.new_slot(module, in_features, out_features, activation_axes)
    return replace(plain, technique=NAME, tensors=(*plain.tensors, bias, scaling))


class LoraBias(lora.Lora):
    """See the module."""

    name, title = NAME, "LoRA with a bias"
    inert = "every lora_B and its bias are zero"
    suffixes = (*lora.Lora.suffixes, _BIAS)
    parts: ClassVar = {"lora_B": (lora.B, BIAS)}
    zero_at_first = (*lora.Lora.zero_at_first, _BIAS)
    by_row: ClassVar[Sequence[str]] = (lora.SCALING, BIAS)

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("lora_bias")) and not config.get("use_dora")

    def problem(self, slot: Slot) -> str | None:
        by_name = {tensor.name: tensor for tensor in slot.tensors}
        if by_name.keys() != {lora.A, lora.B, lora.SCALING, BIAS, BIAS_SCALING}:
            return f"has the tensors {list(by_name)}, which are not those of a LoRA with a bias"
        sizes = (*by_name[lora.A].shape[:1], *by_name[BIAS].shape[:1])
        whole = [size for size in sizes if isinstance(size, int) and size > 0]
        if len(whole) != 2:
            return f"has sizes {list(sizes)}, expected those of a linear"
        return difference(slot, new_slot(slot.module, whole[0], whole[1], slot.activation_axes))

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        found = super().values(slot, adapter)
        if not found:
            return {}
        return found | {slot.input(BIAS_SCALING): np.full(1, adapter.scaling(slot.module), np.float32)}

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: a fresh LoRA, and a bias of zeros."""
        bias = slot.tensor(BIAS)
        return super().fresh(slot, size, rng, read_weight) | {bias.input: np.zeros(bias.sized(0), np.float32)}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        return super().fresh_config(size, slots) | {"lora_bias": True}

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        for slot, tensors in values:
            if tensors[slot.input(BIAS_SCALING)][0] != tensors[slot.input(lora.SCALING)][0]:
                raise AdapterError(
                    f"{origin}: module {slot.module}: its bias has another scaling than its matrices, which "
                    "PEFT's format cannot hold: use the adapter's folder"
                )
        return super().config_of(values, origin)

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        found = super().mixed(slot, weighted, read_weight)
        if not weighted:
            return found
        name, factor = slot.input(BIAS), slot.input(BIAS_SCALING)
        first, weight = weighted[0]
        if len(weighted) == 1:
            return found | {name: first[name], factor: first[factor] * np.float32(weight)}
        # What PEFT's format can hold stays so: one scaling for all, where the matrices have one.
        scaling = found[slot.input(lora.SCALING)][:1]
        scaling = scaling if scaling[0] else np.ones(1, np.float32)
        total = sum(
            (values[name] * (values[factor] * weight) for values, weight in weighted),
            np.zeros(slot.tensor(BIAS).sized(0), np.float32),
        )
        return found | {name: (total / scaling).astype(np.float32), factor: scaling}

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        found = super().rows(slot, adapters, weights, read_weight)
        if not adapters:
            return found
        name, factor = slot.input(BIAS), slot.input(BIAS_SCALING)
        biases = weights @ np.stack([values[name] * values[factor] for values in adapters])
        shape = (len(weights), *(1,) * (slot.activation_axes - 2), -1)
        return found | {
            name: np.ascontiguousarray(biases.reshape(shape), np.float32),
            factor: np.ones(1, np.float32),
        }

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        if config["lora_bias"] is not True:
            raise AdapterError(f"{origin}: lora_bias is {config['lora_bias']!r}, expected true or false")
        super().check_config({**config, "lora_bias": False}, origin)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        PeftTechnique.check(self, config, tensors, origin)
        return super().check(
            config, {key: value for key, value in tensors.items() if not key.endswith(_BIAS)}, origin
        )

    def fit(self, slot: Slot, adapter: Held) -> None:
        super().fit(slot, adapter)
        bias = slot.tensor(BIAS)
        shape = adapter.tensors[bias.input].shape
        if shape != bias.shape:
            raise AdapterError(
                f"{adapter.origin}: module {slot.module}: lora_B's bias is {list(shape)} in the adapter, "
                f"{list(bias.shape)} in this bundle: the adapter was made for another base"
            )

    def has_effect(self, adapter: Held) -> bool:
        """A B or a bias that is not all zeros, and whose scaling is not zero."""
        return super().has_effect(adapter) or any(
            bool(adapter.tensors[f"{PREFIX}{module}{_BIAS}"].any()) and adapter.scaling(module) != 0
            for module in self.modules(adapter.tensors)
        )


TECHNIQUE = LoraBias()
