"""AdaLoRA: a low-rank product with singular values beside a linear module, `y += (((x A) * scaling) * E) B`.

In the graphs `A` is `[in_features, rank]`, `E`, the singular values, `[1, rank]` and `B` `[rank,
out_features]`: PEFT's `lora_A`, `lora_E` and `lora_B` transposed. The scaling `[rank]` is `lora_alpha /
(init_r + 1e-5)` for every rank, whatever was left of `init_r`. Slots switch off, adapters mix and rows differ
as with LoRA.

Training begins with rank `init_r` on every module and ends with `target_r` on average. What is left of a
module's ranks, the configuration's `rank_pattern` says: a list of `init_r` booleans by `MODULE.lora_E`; the
tensors hold the rows that are true there. Which they are, `edgepeft.runtime.training.techniques` decides.

Source: arXiv 2303.10512; `peft.tuners.adalora`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ..adapter_settings import check_number
from ..errors import AdapterError
from ..slots import EMPTY, PREFIX, SIZE, Slot, SlotTensor
from . import lora
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Tensors, difference
from .lora import SCALING, A, B

NAME, E = "adalora", "E"
_SUFFIXES = {A: ".lora_A", B: ".lora_B", E: ".lora_E"}
_DEVIATION = 0.02
# PEFT keeps the divisor as a float32.
_EPSILON = 1e-5
# Defaults of PEFT's configuration: 12 ranks to begin with where 8 are to be left.
_INITIAL_BY_TARGET = 1.5
# Of a fresh adapter: with the rates that suit LoRA, a few dozen steps move its weight as far.
_ALPHA_BY_INITIAL = 64
DEFAULTS: Mapping[str, Any] = {
    "init_r": 12,
    "target_r": 8,
    "lora_alpha": 8,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
    "total_step": None,
    "rank_pattern": None,
}
"""What PEFT takes where a configuration says nothing."""


def setting(config: Mapping[str, Any], name: str) -> Any:
    """A value of a checked configuration, or PEFT's default."""
    return config.get(name, DEFAULTS[name])


def new_slot(module: str, in_features: int, out_features: int, activation_axes: int) -> Slot:
    """A slot on a linear module `[in_features] -> [out_features]`; see `Slot` for its axes."""
    plain = lora.new_slot(module, in_features, out_features, activation_axes)
    shapes: dict[str, tuple[int | str, ...]]
    shapes = {A: (in_features, SIZE), E: (1, SIZE), B: (SIZE, out_features)}
    stored = []
    for name, shape in shapes.items():
        key = f"{PREFIX}{module}{_SUFFIXES[name]}"
        stored.append(SlotTensor(name, key, key, shape, transposed=True, trains=True, neutral=EMPTY))
    return replace(plain, technique=NAME, tensors=(*stored, plain.tensor(SCALING)))


def pattern_key(module: str) -> str:
    """What `rank_pattern` calls a module."""
    return f"{module}{_SUFFIXES[E]}"


class AdaLora(lora.Lora):
    """See the module."""

    name, title, peft_type = NAME, "AdaLoRA", "ADALORA"
    inert = "every lora_E is zero"
    suffixes = tuple(_SUFFIXES.values())
    parts: ClassVar = {}
    zero_at_first = (_SUFFIXES[E],)

    def is_of(self, config: Mapping[str, Any]) -> bool:
        return PeftTechnique.is_of(self, config)

    def problem(self, slot: Slot) -> str | None:
        shapes = {tensor.name: tensor.shape for tensor in slot.tensors}
        sizes = (*shapes.get(A, ())[:1], *shapes.get(B, ())[1:2])
        whole = [size for size in sizes if isinstance(size, int) and size > 0]
        if len(whole) != 2:
            return f"has tensors of shapes {list(shapes.values())}, which are no AdaLoRA's"
        return difference(slot, new_slot(slot.module, whole[0], whole[1], slot.activation_axes))

    def first_size(self, size: int) -> int:
        return math.ceil(_INITIAL_BY_TARGET * size)

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: A and B normal, E zero."""
        del read_weight
        in_features, out_features = lora.features(slot)
        rank = self.first_size(size)
        shapes = {A: (rank, in_features), B: (out_features, rank)}
        drawn = {
            slot.input(name): (_DEVIATION * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        return drawn | {slot.input(E): np.zeros((rank, 1), np.float32)}

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With `size` for `target_r` and alpha = 64 `init_r`; the number of steps decides the schedule."""
        del slots
        rank = self.first_size(size)
        return {
            **DEFAULTS,
            "init_lora_weights": True,
            "init_r": rank,
            "lora_alpha": _ALPHA_BY_INITIAL * rank,
            "lora_dropout": 0.0,
            "target_r": size,
            "total_step": 1,
        }

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        """With the largest rank as `init_r`, of which others have what their pattern says."""
        factors = {slot.module: item[slot.input(SCALING)] for slot, item in values}
        scalings = sorted({float(factor) for own in factors.values() for factor in own})
        if len(scalings) > 1:
            raise AdapterError(
                f"{origin}: its scaling differs between ranks, so it is a mixture, which PEFT's format "
                "cannot hold: add its adapters one by one"
            )
        ranks = {module: own.size for module, own in factors.items()}
        rank = max(ranks.values(), default=1)
        patterns = {
            pattern_key(module): [index < own for index in range(rank)]
            for module, own in ranks.items()
            if own != rank
        }
        return self.fresh_config(rank, ()) | {
            "init_r": rank,
            "target_r": rank,
            "lora_alpha": lora.alpha_of(scalings[0], _divisor(rank)) if scalings else 1,
            "rank_pattern": patterns or None,
        }

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        lora.check_options(config, origin)
        for name in ("init_r", "target_r", "deltaT", "total_step"):
            check_number(origin, name, setting(config, name), integer=True)
        for name in ("tinit", "tfinal"):
            check_number(origin, name, setting(config, name), integer=setting(config, name) != 0)
        for name in ("lora_alpha", "beta1", "beta2", "orth_reg_weight"):
            check_number(origin, name, setting(config, name), integer=False)
        for name in ("beta1", "beta2"):
            if not 0 < setting(config, name) < 1:
                raise AdapterError(f"{origin}: {name} is {setting(config, name)}, expected between 0 and 1")
        if setting(config, "orth_reg_weight") < 0:
            raise AdapterError(
                f"{origin}: orth_reg_weight is {setting(config, 'orth_reg_weight')}, expected a number from 0"
            )
        patterns = setting(config, "rank_pattern")
        if patterns is not None and not isinstance(patterns, dict):
            raise AdapterError(f"{origin}: rank_pattern is {patterns!r}, expected an object")
        rank = setting(config, "init_r")
        for key, mask in (patterns or {}).items():
            if not isinstance(mask, list) or len(mask) != rank or {*map(type, mask)} - {bool}:
                raise AdapterError(
                    f"{origin}: rank_pattern[{key!r}] is {_short(mask)}, expected {rank} times (init_r) true "
                    "or false"
                )

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        """The factors are `lora_alpha / (init_r + 1e-5)`; with an alpha of 0 or less, what is left of the
        module's rank stands for it."""
        lora.check_keys(tensors, origin)
        PeftTechnique.check(self, config, tensors, origin)
        patterns = setting(config, "rank_pattern") or {}
        initial, alpha = setting(config, "init_r"), setting(config, "lora_alpha")
        found = {}
        for module in self.modules(tensors):
            shapes = [tensors[f"{PREFIX}{module}{suffix}"].shape for suffix in self.suffixes]
            mask = patterns.get(pattern_key(module))
            rank = initial if mask is None else sum(mask)
            a, b, e = shapes
            if (a[:1], b[1:], e) != ((rank,), (rank,), (rank, 1)) or (len(a), len(b)) != (2, 2):
                raise AdapterError(
                    f"{origin}: module {module}: lora_A, lora_B and lora_E are {list(map(list, shapes))}, "
                    f"the configuration gives it rank {rank}: expected [{rank}, in_features], [out_features, "
                    f"{rank}] and [{rank}, 1]"
                )
            found[module] = (alpha if alpha > 0 else rank) / _divisor(initial)
        return found

    def has_effect(self, adapter: Held) -> bool:
        """A singular value and a B that are not all zeros, and whose scaling is not zero."""
        return any(
            all(adapter.tensors[f"{PREFIX}{module}{_SUFFIXES[name]}"].any() for name in (B, E))
            and adapter.scaling(module) != 0.0
            for module in self.modules(adapter.tensors)
        )


TECHNIQUE = AdaLora()


def _divisor(rank: int) -> float:
    return float(np.float32(rank) + np.float32(_EPSILON))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
