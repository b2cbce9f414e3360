"""Prefix tuning: keys and values of virtual tokens, in every layer, which stand in front of a text's own.

PEFT's file has one tensor `[virtual tokens, layers * 2 * width]`, a layer's keys before its values; here
every layer has a slot of its own. They are what a cache holds: keys that positions have turned already.

Source: arXiv 2101.00190; `peft.tuners.prefix_tuning`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import AdapterError
from ..slots import ATTENTION, EMPTY, PREFIX, SIZE, Slot, SlotTensor
from ..virtual_tokens import FIRST_ID, KEY, VirtualTokens
from .base import FloatArray, Held, ReadWeight, Tensors, difference

NAME = "prefix_tuning"
K, V = "key", "value"
LAYER, HEADS = "layer", "heads"
"""A slot's settings: the layer's number, and how many heads its keys and values have."""

ALL = "past_key_values"
"""Where a slot is asked for in every layer."""
# A fresh prefix is small: PEFT's deviation of 1 drowns what the first layers say.
_DEVIATION = 0.02


def new_slot(layer: int, first_id: int, heads: int, head_dim: int) -> Slot:
    """A slot on the keys and values of a layer, `[batch, heads, sequence, head_dim]`."""
    module, tensors = f"{ALL}.{layer}", []
    for name in (K, V):
        key = f"{PREFIX}{module}.{name}"
        shape = (SIZE, heads * head_dim)
        tensors.append(SlotTensor(name, key, key, shape, transposed=False, trains=True, neutral=EMPTY))
    settings: dict[str, bool | int | float | str] = {FIRST_ID: first_id, LAYER: layer, HEADS: heads}
    return Slot(NAME, ATTENTION, module, tuple(tensors), settings, activation_axes=4)


class PrefixTuning(VirtualTokens):
    """See the module."""

    name, title, peft_type = NAME, "prefix tuning", "PREFIX_TUNING"
    inert = "it stores no prefix"
    suffixes = (f".{K}", f".{V}")
    place, predicts = 2, False

    def in_decoder(self, module: str) -> bool:
        del module
        return False

    def owns(self, key: str) -> bool:
        return key.startswith(f"{PREFIX}{ALL}.")

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        own = (key for key in tensors if self.owns(key) and key.endswith(self.suffixes[0]))
        return tuple(key[len(PREFIX) : -len(self.suffixes[0])] for key in own)

    def cache(self, slot: Slot, values: Tensors) -> dict[str, FloatArray]:
        found = {}
        for tensor in slot.tensors:
            if len(rows := values[tensor.input]):
                heads = rows.reshape(len(rows), int(slot.settings[HEADS]), -1).transpose(1, 0, 2)
                found[f"{slot.settings[LAYER]}.{tensor.name}"] = np.ascontiguousarray(heads)
        return found

    def from_file(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
        """
        Raises:
            AdapterError: the prefix is not as wide as the configuration's layers.
        """
        found = super().from_file(config, tensors, origin)
        whole = found.pop(KEY, None)
        if whole is None:
            return found
        layers = config.get("num_layers")
        if type(layers) is not int or layers < 1 or whole.ndim != 2 or whole.shape[1] % (2 * layers):
            raise AdapterError(
                f"{origin}: {KEY} is {list(whole.shape)}, no keys and values of num_layers {layers!r}"
            )
        for index, part in enumerate(np.split(whole, 2 * layers, axis=1)):
            key = f"{PREFIX}{ALL}.{index // 2}.{V if index % 2 else K}"
            found[key] = np.ascontiguousarray(part)
        return found

    def to_file(self, tensors: Tensors) -> dict[str, FloatArray]:
        own = {key: value for key, value in tensors.items() if self.owns(key)}
        others = {key: value for key, value in tensors.items() if key not in own}
        stems = [f"{PREFIX}{ALL}.{layer}" for layer in range(len(own) // 2)]
        parts = [own[f"{stem}.{name}"] for stem in stems for name in (K, V)]
        return super().to_file(others) | ({KEY: np.concatenate(parts, axis=1)} if parts else {})

    def problem(self, slot: Slot) -> str | None:
        first_id, layer, heads = (slot.settings.get(name) for name in (FIRST_ID, LAYER, HEADS))
        whole = [value for value in (first_id, layer, heads) if type(value) is int]
        width = slot.tensors[0].shape[-1] if slot.tensors else None
        if len(whole) != 3 or min(whole[0], whole[2]) < 1 or whole[1] < 0:
            return f"has the settings {slot.settings}"
        if not isinstance(width, int) or width < 1 or width % whole[2]:
            return f"has keys of width {width} for {heads} heads"
        return difference(slot, new_slot(whole[1], whole[0], whole[2], width // whole[2]))

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """Normal and small."""
        del read_weight
        return {
            tensor.input: (_DEVIATION * rng.standard_normal(tensor.sized(size))).astype(np.float32)
            for tensor in slot.tensors
        }

    def config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        found = super().config(size, slots)
        return found | {
            "encoder_hidden_size": found["token_dim"],
            "num_attention_heads": int(slots[0].settings[HEADS]) if slots else None,
            "num_layers": len(slots),
            "prefix_projection": False,
        }

    def fit(self, slot: Slot, adapter: Held) -> None:
        for tensor in slot.tensors:
            width = adapter.tensors[tensor.input].shape[1]
            if width != tensor.shape[1]:
                raise AdapterError(
                    f"{adapter.origin}: layer {slot.settings[LAYER]}: its {tensor.name}s are {width} wide, "
                    f"this bundle's {tensor.shape[1]}: the adapter was made for another base"
                )


TECHNIQUE = PrefixTuning()
