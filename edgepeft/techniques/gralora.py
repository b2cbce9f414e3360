"""GraLoRA: low-rank products beside the blocks of a linear module's weight, which exchange their ranks.

    x in k blocks, h_n = x_n A_n, split in k parts: h_n = (h_n1, …, h_nk);  y_j += (h_1j, …, h_kj) B_j · s

`gralora_A` `[k, in_features / k, r]` and `gralora_B` `[k, r, out_features / k]` are in the graphs as in
PEFT's file, and so is the pair of a LoRA of rank `hybrid_r` over the whole module, if there is one. The
scaling is `alpha / (r + hybrid_r)`.

Source: arXiv 2505.20355; `peft.tuners.gralora`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..adapter_settings import check_bias, check_number
from ..errors import AdapterError
from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import RANK, FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference, uniform
from .factors import Factors, scaling_tensor

NAME = "gralora"
A, B = "gralora_A", "gralora_B"
GENERAL_A, GENERAL_B = "gralora_A_general", "gralora_B_general"
BLOCKS, HYBRID = "gralora_k", "hybrid_r"
"""Settings, PEFT's own."""
_DEFAULTS = {"r": 32, BLOCKS: 2, HYBRID: 0, "alpha": 64}
DEFAULT_BLOCKS = _DEFAULTS[BLOCKS]


def new_slot(module: str, in_features: int, out_features: int, settings: Settings) -> Slot:
    """A slot on a linear module `[in_features] -> [out_features]`."""
    rank, blocks, hybrid = (int(settings[name]) for name in (RANK, BLOCKS, HYBRID))
    shapes: dict[str, tuple[int, ...]] = {
        A: (blocks, in_features // blocks, rank),
        B: (blocks, rank, out_features // blocks),
    }
    if hybrid:
        shapes |= {GENERAL_A: (hybrid, in_features), GENERAL_B: (out_features, hybrid)}
    tensors = []
    for name, shape in shapes.items():
        key = f"{PREFIX}{module}.{name}" + (".weight" if name in (GENERAL_A, GENERAL_B) else "")
        tensors.append(SlotTensor(name, key, key, shape, transposed=False, trains=True, neutral=ZEROS))
    return Slot(NAME, LINEAR, module, (*tensors, scaling_tensor(module)), dict(settings))


class GraLoRA(Factors):
    """See the module."""

    name, title, peft_type = NAME, "GraLoRA", "GRALORA"
    inert = "a factor of every product is zero"
    suffixes = (f".{A}", f".{B}")
    bias_of_targets = "gralora_only"
    _general: ClassVar = (f".{GENERAL_A}.weight", f".{GENERAL_B}.weight")

    def features(self, slot: Slot) -> tuple[int, int]:
        blocks = int(slot.settings[BLOCKS])
        return blocks * int(slot.tensor(A).shape[1]), blocks * int(slot.tensor(B).shape[2])

    def problem(self, slot: Slot) -> str | None:
        settings, shapes = slot.settings, [tensor.shape for tensor in slot.tensors[:2]]
        sizes = [settings.get(name) for name in (RANK, BLOCKS, HYBRID)]
        rank, blocks, hybrid = (size if type(size) is int else -1 for size in sizes)
        if rank < 1 or blocks < 1 or hybrid < 0 or rank % blocks:
            return f"has settings {settings}, which are not GraLoRA's"
        if [len(shape) for shape in shapes] != [3, 3] or [tensor.name for tensor in slot.tensors[:2]] != [
            A,
            B,
        ]:
            return f"has tensors of shapes {[list(shape) for shape in shapes]}, which are not GraLoRA's"
        if not all(isinstance(size, int) and size > 0 for shape in shapes for size in shape):
            return f"has tensors of shapes {[list(shape) for shape in shapes]}, expected sizes"
        return difference(slot, new_slot(slot.module, *self.features(slot), settings))

    def owns(self, key: str) -> bool:
        return key.endswith((*self.suffixes, *self._general))

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        return PeftTechnique.modules(self, tensors)

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        values = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
        for name in ("r", BLOCKS):
            check_number(origin, name, values[name], integer=True)
        check_number(origin, HYBRID, values[HYBRID], integer=values[HYBRID] != 0)
        check_number(origin, "alpha", values["alpha"], integer=False)
        if values["r"] % values[BLOCKS]:
            raise AdapterError(
                f"{origin}: r is {values['r']}, expected a multiple of gralora_k, which is {values[BLOCKS]}"
            )
        check_bias(config, self.bias_of_targets, origin)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        rank, blocks, hybrid, alpha = (config.get(name, default) for name, default in _DEFAULTS.items())
        for key, value in tensors.items():
            if key.endswith(self.suffixes):
                expected = (
                    (blocks, *((value.shape[1], rank) if key.endswith(A) else (rank, value.shape[2])))
                    if value.ndim == 3
                    else ()
                )
                if value.shape != expected:
                    raise AdapterError(
                        f"{origin}: tensor {key} is {list(value.shape)}, the configuration has {blocks} "
                        f"blocks (gralora_k) of rank {rank}"
                    )
        PeftTechnique.check(self, config, tensors, origin)
        modules = self.modules(tensors)
        for module in modules:
            general = [tensors.get(f"{PREFIX}{module}{suffix}") for suffix in self._general]
            ranks = [
                0 if value is None or value.ndim != 2 else value.shape[axis]
                for axis, value in enumerate(general)
            ]
            if ranks != [hybrid, hybrid]:
                raise AdapterError(
                    f"{origin}: module {module} has a LoRA of the ranks {ranks} over all blocks, the "
                    f"configuration gives it {hybrid} (hybrid_r)"
                )
        return dict.fromkeys(modules, alpha / (rank + hybrid))

    def settings(self, adapter: Held, module: str) -> Settings:
        del module
        config = adapter.config
        rank, blocks, hybrid = (int(config.get(name, _DEFAULTS[name])) for name in ("r", BLOCKS, HYBRID))
        return {RANK: rank, BLOCKS: blocks, HYBRID: hybrid}

    def rank(self, tensors: Tensors, module: str) -> int:
        tensor = tensors.get(f"{PREFIX}{module}.{A}")
        return 0 if tensor is None else int(tensor.shape[2])

    def fit(self, slot: Slot, adapter: Held) -> None:
        own, there = self.settings(adapter, slot.module), slot.settings
        if own != there:
            raise AdapterError(
                f"{adapter.origin}: module {slot.module} needs a slot with {dict(own)}, this bundle has one "
                f"with {there}: export the base together with this adapter"
            )
        super().fit(slot, adapter)

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: B zero, A uniform."""
        del size, read_weight
        values = {}
        for tensor in slot.tensors:
            if tensor.name == A:
                blocks, width, rank = tensor.sized(0)
                drawn = [uniform(rng, (rank, width)).T for _ in range(blocks)]
                values[tensor.input] = np.ascontiguousarray(np.stack(drawn))
            elif tensor.name == GENERAL_A:
                values[tensor.input] = uniform(rng, (tensor.sized(0)[0], tensor.sized(0)[1]))
            elif tensor.key is not None:
                values[tensor.input] = np.zeros(tensor.sized(0), np.float32)
        return values

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With alpha = r + hybrid_r; the rest is the slots'."""
        first = slots[0].settings if slots else {RANK: size, BLOCKS: DEFAULT_BLOCKS, HYBRID: 0}
        rank, hybrid = int(first[RANK]), int(first[HYBRID])
        return {
            "r": rank,
            BLOCKS: int(first[BLOCKS]),
            HYBRID: hybrid,
            "alpha": rank + hybrid,
            "gralora_dropout": 0.0,
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        scalings = {float(tensors[slot.input("scaling")][0]) for slot, tensors in values}
        if len(scalings) > 1:
            raise AdapterError(
                f"{origin}: has the scalings {sorted(scalings)}, of which PEFT's format holds one for all "
                "modules: use the adapter's folder"
            )
        config = self.fresh_config(0, [slot for slot, _ in values])
        rank = config["r"] + config[HYBRID]
        return config | {"alpha": rank * next(iter(scalings), 1.0)}

    def has_effect(self, adapter: Held) -> bool:
        """Whether no factor of one of the pairs is all zeros, and the scaling is not zero."""
        for module in self.modules(adapter.tensors):
            for pair in (self.suffixes, self._general):
                own = [adapter.tensors.get(f"{PREFIX}{module}{suffix}") for suffix in pair]
                if all(value is not None and value.any() for value in own) and adapter.scaling(module) != 0:
                    return True
        return False


TECHNIQUE = GraLoRA()
