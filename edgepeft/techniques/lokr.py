"""LoKr: a Kronecker product of two small matrices beside a linear module.

    y += x (w1 ⊗ w2)ᵀ · alpha / r        w1 [a, c], w2 [b, d]; out_features = a b, in_features = c d

Either matrix is stored whole or as a product of rank r: `w1`, or `w1_a` `[a, r]` and `w1_b` `[r, c]`. In the
graphs they are as in PEFT's file.

Source: LyCORIS, arXiv 2309.14859; `peft.tuners.lokr`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ..adapter_settings import read_patterns
from ..errors import AdapterError
from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import RANK, FloatArray, Held, ReadWeight, Settings, Tensors, difference, uniform
from .factors import Factors, scaling_tensor

NAME = "lokr"
SIZES = ("out_blocks", "out_block", "in_blocks", "in_block")
"""Settings: a, b, c, d."""
RANKS = {"lokr_w1": "w1_rank", "lokr_w2": "w2_rank"}
"""Settings: the rank of the product that a matrix is stored as, 0 where it is stored whole."""
FACTOR, BOTH = "decompose_factor", "decompose_both"
"""Settings: PEFT's own, from which, and the rank, it derives the others."""


def parts(settings: Settings) -> dict[str, tuple[int, int]]:
    """The shapes of what is stored, by its name in PEFT's keys."""
    a, b, c, d = (int(settings[name]) for name in SIZES)
    found: dict[str, tuple[int, int]] = {}
    for (matrix, setting), (rows, columns) in zip(RANKS.items(), ((a, c), (b, d)), strict=True):
        rank = int(settings[setting])
        if rank:
            found |= {f"{matrix}_a": (rows, rank), f"{matrix}_b": (rank, columns)}
        else:
            found[matrix] = rows, columns
    return found


def new_slot(module: str, settings: Settings) -> Slot:
    """A slot on a linear module whose sizes are in the settings."""
    tensors = []
    for name, shape in parts(settings).items():
        key = f"{PREFIX}{module}.{name}"
        tensors.append(SlotTensor(name, key, key, shape, transposed=False, trains=True, neutral=ZEROS))
    return Slot(NAME, LINEAR, module, (*tensors, scaling_tensor(module)), settings=dict(settings))


class LoKr(Factors):
    """See the module."""

    name, title, peft_type = NAME, "LoKr", "LOKR"
    inert = "a factor of every product is zero"
    suffixes = tuple(f".{matrix}{part}" for matrix in RANKS for part in ("", "_a", "_b"))
    refused: ClassVar = {".lokr_t2": "a LoKr on a convolution"}

    def features(self, slot: Slot) -> tuple[int, int]:
        a, b, c, d = (int(slot.settings[name]) for name in SIZES)
        return c * d, a * b

    def problem(self, slot: Slot) -> str | None:
        names = (*SIZES, *RANKS.values(), RANK, FACTOR)
        settings = slot.settings
        if settings.keys() != {*names, BOTH} or not all(type(settings[name]) is int for name in names):
            return f"has settings {settings}, which are not LoKr's"
        if (
            min(int(settings[name]) for name in SIZES) < 1
            or min(int(settings[n]) for n in RANKS.values()) < 0
        ):
            return f"has settings {settings}, expected sizes"
        return difference(slot, new_slot(slot.module, settings))

    def settings(self, adapter: Held, module: str) -> Settings:
        """
        Raises:
            AdapterError: a matrix is missing, or its factors do not go together.
        """
        found, sizes = dict[str, int](), list[tuple[int, int]]()
        stem = f"{PREFIX}{module}"
        for matrix, setting in RANKS.items():
            whole, up, down = (adapter.tensors.get(f"{stem}.{matrix}{part}") for part in ("", "_a", "_b"))
            if (whole is None) == (up is None or down is None) or (up is None) != (down is None):
                raise AdapterError(
                    f"{adapter.origin}: module {module}: expected {matrix}, or {matrix}_a and {matrix}_b"
                )
            if whole is not None:
                rows, columns, rank = *whole.shape, 0
            else:
                assert up is not None
                assert down is not None
                rows, columns, rank = up.shape[0], down.shape[1], up.shape[1]
                if rank != down.shape[0]:
                    raise AdapterError(
                        f"{adapter.origin}: module {module}: {matrix}_a has rank {rank}, {matrix}_b rank "
                        f"{down.shape[0]}"
                    )
            found[setting] = int(rank)
            sizes.append((int(rows), int(columns)))
        (a, c), (b, d) = sizes
        ranks = read_patterns(adapter.config, "rank_pattern", [module], adapter.origin)
        own = {RANK: int(ranks.value(module, adapter.config["r"]))}
        own |= {FACTOR: int(adapter.config.get(FACTOR, -1)), BOTH: bool(adapter.config.get(BOTH))}
        return dict(zip(SIZES, (a, b, c, d), strict=True)) | found | own

    def rank(self, tensors: Tensors, module: str) -> int:
        found = [tensors.get(f"{PREFIX}{module}.{matrix}_b") for matrix in RANKS]
        return max((int(value.shape[0]) for value in found if value is not None), default=0)

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: the first matrix zero, the second uniform."""
        del size, read_weight
        values = {tensor.name: uniform(rng, tensor.sized(0)) for tensor in slot.tensors if tensor.key}
        values["lokr_w1" if "lokr_w1" in values else "lokr_w1_a"][:] = 0
        return {slot.input(name): value for name, value in values.items()}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With the slots' decomposition."""
        settings: Settings = slots[0].settings if slots else {FACTOR: -1, BOTH: False}
        own = {name: settings[name] for name in (FACTOR, BOTH)}
        return super().fresh_config(size, slots) | own | {"rank_dropout_scale": False}


TECHNIQUE = LoKr()
