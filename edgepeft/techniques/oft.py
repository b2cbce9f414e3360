"""OFT: a rotation of what a linear module reads, in blocks of its features.

    y = (x R) Wᵀ + b        R = I + 2Q + 2Q² + … (Cayley-Neumann), Q = -Qᵀ

`oft_R` `[blocks, n]` holds the `n = block (block - 1) / 2` values above the diagonal of every block's Q, row
by row, in the graphs as in PEFT's file; with `block_share` there is one for all blocks. Zeros leave the
module exactly as it is. In the inference graph the rows of a batch may have rotations of their own,
`[batch, blocks, n]`. Rotations that are active together have no sum, and PEFT scales none.

Source: arXiv 2306.07280; the parameterization: arXiv 2506.19847; `peft.tuners.oft`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter_settings import check_bias, check_number
from ..errors import AdapterError
from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference

NAME = "oft"
ROTATION = "oft_R"
IN_FEATURES = "in_features"
"""Setting: what the module reads."""
R, BLOCK_SIZE, BLOCK_SHARE, TERMS = "r", "oft_block_size", "block_share", "num_cayley_neumann_terms"
"""Settings: PEFT's own; the first two are what was asked for, of which one is 0."""

DEFAULT_BLOCK_SIZE, _TERMS = 32, 5  # PEFT's
_KEY = f".{ROTATION}.weight"
_REFUSED_KEYS = {
    ".oft_embedding_R.weight": "an OFT on an embedding",
    ".oft_r": "an OFT of a PEFT before 0.16, whose tensors mean something else",
}
_REFUSED = {
    "use_cayley_neumann": (True, "solves a linear system, for which there is no standard ONNX operator"),
    "coft": (False, "projects the parameters in every forward pass"),
}
# Rotations that one batch's rows may have are multiplied with `[batch, sequence, features]`.
_AXES = 3


def block_size(in_features: int, r: int, size: int) -> int:
    """The size of a block, from what was asked for: the nearest that divides the features, or the lower."""
    asked = r or size
    if asked >= in_features:
        nearest = in_features
    else:
        around = (number for step in range(asked) for number in (asked - step, asked + step))
        nearest = next(number for number in around if in_features % number == 0)
    return in_features // nearest if r else nearest


def blocks(settings: Settings) -> tuple[int, int]:
    """How many blocks a slot has, and their size."""
    in_features = int(settings[IN_FEATURES])
    size = block_size(in_features, int(settings[R]), int(settings[BLOCK_SIZE]))
    return in_features // size, size


def new_slot(module: str, settings: Settings, activation_axes: int) -> Slot:
    """A slot on a linear module."""
    count, size = blocks(settings)
    key = f"{PREFIX}{module}{_KEY}"
    shape = (1 if settings[BLOCK_SHARE] else count, size * (size - 1) // 2)
    rotation = SlotTensor(ROTATION, key, key, shape, transposed=False, trains=True, neutral=ZEROS)
    return Slot(NAME, LINEAR, module, (rotation,), dict(settings), activation_axes)


class Oft(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "OFT", "OFT"
    inert = "every oft_R is zero"
    suffixes = (_KEY,)
    by_row = (ROTATION,)
    bias_of_targets = "oft_only"

    def problem(self, slot: Slot) -> str | None:
        settings = slot.settings
        numbers = [settings.get(name) for name in (IN_FEATURES, R, BLOCK_SIZE, TERMS)]
        if not all(type(number) is int and number >= 0 for number in numbers) or not (
            settings.get(IN_FEATURES) and settings.get(R) != settings.get(BLOCK_SIZE)
        ):
            return f"has settings {settings}, which are not OFT's"
        if settings.get(BLOCK_SHARE) not in (True, False):
            return f"has {BLOCK_SHARE} {settings.get(BLOCK_SHARE)!r}, expected true or false"
        return difference(slot, new_slot(slot.module, settings, slot.activation_axes))

    def owns(self, key: str) -> bool:
        return key.endswith((_KEY, *_REFUSED_KEYS))

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        for name, (wanted, meaning) in _REFUSED.items():
            if (value := config.get(name, wanted)) is not wanted:
                raise AdapterError(
                    f"{origin}: {name}={value!r} {meaning}: train the adapter with {name}={wanted}, or merge "
                    "it"
                )
        check_bias(config, self.bias_of_targets, origin)
        if not isinstance(share := config.get(BLOCK_SHARE, False), bool):
            raise AdapterError(f"{origin}: {BLOCK_SHARE} is {share!r}, expected true or false")
        r, size = config.get(R, 0), config.get(BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
        for name, value in ((R, r), (BLOCK_SIZE, size)):
            if value != 0:
                check_number(origin, name, value, integer=True)
        if (r == 0) == (size == 0):
            raise AdapterError(f"{origin}: r is {r} and oft_block_size {size}, expected one of them to be 0")
        check_number(origin, TERMS, config.get(TERMS, _TERMS), integer=True)
        if config.get(TERMS, _TERMS) < 2:
            raise AdapterError(f"{origin}: {TERMS} is 1, with which nothing is rotated: expected at least 2")

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        for key, value in tensors.items():
            for end, meaning in _REFUSED_KEYS.items():
                if key.endswith(end):
                    raise AdapterError(f"{origin}: tensor {key} belongs to {meaning}, which is not supported")
            if key.endswith(_KEY) and value.ndim != 2:
                raise AdapterError(f"{origin}: tensor {key} has {value.ndim} axes, expected 2")
        return super().check(config, tensors, origin)

    def settings(self, adapter: Held, module: str) -> Settings:
        """As the configuration says; what the module reads, the graph does."""
        del module
        config = adapter.config
        return {
            R: config.get(R, 0),
            BLOCK_SIZE: config.get(BLOCK_SIZE, DEFAULT_BLOCK_SIZE),
            BLOCK_SHARE: config.get(BLOCK_SHARE, False),
            TERMS: config.get(TERMS, _TERMS),
        }

    def fit(self, slot: Slot, adapter: Held) -> None:
        super().fit(slot, adapter)
        self.fit_settings(slot, adapter, (BLOCK_SHARE, TERMS))

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With the slots' blocks."""
        del size
        first = slots[0].settings if slots else {}
        return {
            R: first.get(R, 0),
            BLOCK_SIZE: first.get(BLOCK_SIZE, DEFAULT_BLOCK_SIZE),
            BLOCK_SHARE: first.get(BLOCK_SHARE, False),
            TERMS: first.get(TERMS, _TERMS),
            "use_cayley_neumann": True,
            "coft": False,
            "eps": 6e-5,
            "module_dropout": 0.0,
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        if not adapters or slot.activation_axes != _AXES or slot.settings[BLOCK_SHARE]:
            return super().rows(slot, adapters, weights, read_weight)
        return self.stacked(slot, adapters, weights, read_weight)


TECHNIQUE = Oft()
