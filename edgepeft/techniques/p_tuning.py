"""P-tuning: a prompt whose embeddings a small network makes while it trains.

    prompt = stored + mlp(embedding),    mlp(x) = relu(relu(x W0 + b0) W2 + b2) W4 + b4

PEFT's file has the prompt alone: what trained is read as `stored`, and trains on without the network, as in
PEFT. A fresh one has the network alone.

Source: arXiv 2103.10385; `peft.tuners.p_tuning` (its MLP; a prompt of its LSTM is read like any other).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from ..slots import EMBEDDING, EMPTY, PREFIX, SIZE, ZEROS, Slot, SlotTensor
from ..virtual_tokens import FIRST_ID, KEY, VirtualTokens
from .base import FloatArray, Held, ReadWeight, Tensors, difference, uniform

NAME = "p_tuning"
PROMPT, ENCODER = "word_embeddings", "prompt_encoder"
"""Modules: where the prompt stands, and the network, which only a bundle has that trains one."""
STORED = "prompt"
INPUT = "embedding"
LAYERS = ("mlp_head.0", "mlp_head.2", "mlp_head.4")
HIDDEN = "encoder_hidden_size"
"""A setting of the network's slot."""

_STEM = f"{PREFIX}{ENCODER}."
_STORED, _INPUT = f"{_STEM}{STORED}", f"{_STEM}{INPUT}.weight"


def prompt_slot(first_id: int, width: int) -> Slot:
    """A slot on the embedding of tokens, `[vocabulary, width]`."""
    stored = SlotTensor(STORED, _STORED, _STORED, (SIZE, width), transposed=False, trains=True, neutral=EMPTY)
    return Slot(NAME, EMBEDDING, PROMPT, (stored,), {FIRST_ID: first_id}, activation_axes=3)


def encoder_slot(first_id: int, width: int, hidden: int) -> Slot:
    """A slot for the network, `[width] -> [hidden] -> [hidden] -> [width]`."""
    tensors = [SlotTensor(INPUT, _INPUT, _INPUT, (SIZE, width), transposed=False, trains=True, neutral=EMPTY)]
    sizes = (width, hidden, hidden, width)
    for index, layer in enumerate(LAYERS):
        shapes: dict[str, tuple[int, ...]] = {"weight": sizes[index : index + 2], "bias": (sizes[index + 1],)}
        for part, shape in shapes.items():
            key, turned = f"{_STEM}{layer}.{part}", part == "weight"
            tensors.append(
                SlotTensor(f"{layer}.{part}", key, key, shape, transposed=turned, trains=True, neutral=ZEROS)
            )
    settings: dict[str, bool | int | float | str] = {FIRST_ID: first_id, HIDDEN: hidden}
    return Slot(NAME, EMBEDDING, ENCODER, tuple(tensors), settings)


class PTuning(VirtualTokens):
    """See the module."""

    name, title, peft_type = NAME, "P-tuning", "P_TUNING"
    inert = "it stores no prompt"
    suffixes = (f".{STORED}",)
    place = 1

    def in_decoder(self, module: str) -> bool:
        return module == PROMPT

    def owns(self, key: str) -> bool:
        return key.startswith(_STEM)

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        return ((PROMPT,) if self.count(tensors) else ()) + ((ENCODER,) if _INPUT in tensors else ())

    def count(self, tensors: Tensors) -> int:
        return next((len(tensors[key]) for key in (_STORED, _INPUT) if key in tensors), 0)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        return super().check(
            config, {key: value for key, value in tensors.items() if key in (_STORED, _INPUT)}, origin
        )

    def from_file(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
        found = super().from_file(config, tensors, origin)
        return {_STORED if key == KEY else key: value for key, value in found.items()}

    def to_file(self, tensors: Tensors) -> dict[str, FloatArray]:
        others = {key: value for key, value in tensors.items() if not self.owns(key)}
        prompt = tensors.get(_STORED)
        if _INPUT in tensors:
            made = _encoded(tensors)
            prompt = made if prompt is None else prompt + made
        return super().to_file(others) | ({} if prompt is None else {KEY: prompt})

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        """What it has nothing of is zeros, as many rows as it has virtual tokens."""
        if not (count := self.count(adapter.tensors)):
            return {}
        nothing = {tensor.input: np.zeros(tensor.sized(count), np.float32) for tensor in slot.tensors}
        return nothing | super().values(slot, adapter)

    def problem(self, slot: Slot) -> str | None:
        first_id, width = slot.settings.get(FIRST_ID), slot.tensors[0].shape[-1] if slot.tensors else None
        if type(first_id) is not int or first_id < 1 or not isinstance(width, int) or width < 1:
            return f"has the settings {slot.settings} and a width of {width}"
        if slot.module == PROMPT:
            return difference(slot, prompt_slot(first_id, width))
        hidden = slot.settings.get(HIDDEN)
        if type(hidden) is not int or hidden < 1:
            return f"has {HIDDEN} {hidden!r}"
        return difference(slot, encoder_slot(first_id, width, hidden))

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: the embedding normal, each layer uniform within 1 / sqrt(in_features)."""
        del read_weight
        if slot.module == PROMPT:
            return {}
        own = slot.tensor(INPUT)
        found = {own.input: rng.standard_normal(own.sized(size)).astype(np.float32)}
        for layer in LAYERS:
            weight, bias = (slot.tensor(f"{layer}.{part}") for part in ("weight", "bias"))
            in_features, out_features = weight.sized(size)
            bound = 1 / math.sqrt(in_features)
            found[weight.input] = uniform(rng, (out_features, in_features))
            found[bias.input] = rng.uniform(-bound, bound, out_features).astype(np.float32)
        return found

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """
        Raises:
            UsageError: the bundle has no slot for the network.
        """
        if not any(slot.module == ENCODER for slot in slots):
            raise UsageError(
                "the bundle runs adapters of P-tuning and has no network to begin one with: export the model "
                "with --method p_tuning, or continue an adapter"
            )
        return super().fresh_config(size, slots)

    def config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        hidden = next((slot.settings[HIDDEN] for slot in slots if HIDDEN in slot.settings), None)
        return super().config(size, slots) | {
            "encoder_dropout": 0.0,
            HIDDEN: hidden,
            "encoder_num_layers": 2,
            "encoder_reparameterization_type": "MLP",
        }


TECHNIQUE = PTuning()


def _encoded(tensors: Tensors) -> FloatArray:
    """The network's prompt, `[virtual tokens, width]`; weights in PEFT's layout."""
    values = tensors[_INPUT]
    for index, layer in enumerate(LAYERS):
        values = values @ tensors[f"{_STEM}{layer}.weight"].T + tensors[f"{_STEM}{layer}.bias"]
        if index < len(LAYERS) - 1:
            values = np.maximum(values, 0)
    return values
