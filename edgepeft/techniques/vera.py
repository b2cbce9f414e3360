"""VeRA: a low-rank product of frozen random matrices beside a linear module, scaled by two trained vectors.

    y += lambda_b * (((x Aᵀ) * lambda_d) Bᵀ)

In the graphs, as in PEFT's file, `lambda_d` is `[r]` and `lambda_b` `[out_features]`; `A` `[r, in_features]`
and `B` `[out_features, r]` are what the module uses of one pair for the whole model, of the largest sizes.
They are of the file (`save_projection`), or drawn as PEFT draws them. In the inference graph the vectors may
also have an axis for the rows of a batch in front: rows whose adapters share the pair have vectors of their
own.

Source: arXiv 2310.11454; `peft.tuners.vera`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..adapter_settings import check_number
from ..errors import AdapterError
from ..slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from .base import RANK, FloatArray, Held, PeftTechnique, ReadWeight, Settings, Tensors, difference

NAME = "vera"
D, B_SCALE = "vera_lambda_d", "vera_lambda_b"
A, B = "vera_A", "vera_B"
LARGEST_IN, LARGEST_OUT, MODULES = "largest_in", "largest_out", "modules"
"""Settings: the sizes of the pair that every slot's part is of, and how many slots there are."""

_SHARED = {name: f"base_model.{name}" for name in (A, B)}
_INITIAL_D = 0.1  # PEFT's default of d_initial
_PRNG_KEY = "projection_prng_key"
_KEY = 0  # its default
_LARGEST_KEY = 2**32 - 1


def new_slot(
    module: str, in_features: int, out_features: int, settings: Settings, activation_axes: int
) -> Slot:
    """A slot on a linear module `[in_features] -> [out_features]`."""
    rank = int(settings[RANK])

    def tensor(name: str, shape: tuple[int, ...], *, trains: bool) -> SlotTensor:
        name_there = f"{PREFIX}{module}.{name}"
        key = name_there if trains else None
        return SlotTensor(name, name_there, key, shape, transposed=False, trains=trains, neutral=ZEROS)

    tensors = (
        tensor(B_SCALE, (out_features,), trains=True),
        tensor(D, (rank,), trains=True),
        tensor(A, (rank, in_features), trains=False),
        tensor(B, (out_features, rank), trains=False),
    )
    return Slot(NAME, LINEAR, module, tensors, dict(settings), activation_axes)


@functools.lru_cache(maxsize=1)
def drawn(key: int, rank: int, in_features: int, out_features: int) -> tuple[FloatArray, FloatArray]:
    """`A` and `B` as PyTorch's generator on the CPU, a Mersenne Twister, draws them for PEFT.

    Source: `peft.tuners.vera.model._kaiming_init`; ATen's `uniform_real` takes the lowest 24 bits of each
    draw and multiplies and adds in one step.
    """
    generator = np.random.RandomState(key)  # PyTorch seeds it alike
    found = []
    for shape in ((rank, in_features), (out_features, rank)):
        bound = np.float32(math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1]))
        bits = generator.randint(0, 2**32, shape, np.uint32) & np.uint32(2**24 - 1)
        found.append((bits / 2**24 * np.float64(bound + bound) - bound).astype(np.float32))
    return found[0], found[1]


class Vera(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "VeRA", "VERA"
    inert = "every vera_lambda_b is zero"
    suffixes = (f".{B_SCALE}", f".{D}")
    weighted = B_SCALE
    by_row = (B_SCALE, D)
    shared: ClassVar = tuple(_SHARED.values())

    def problem(self, slot: Slot) -> str | None:
        shapes = [tensor.shape for tensor in slot.tensors]
        sizes = [size for shape in shapes for size in shape]
        if [len(shape) for shape in shapes] != [1, 1, 2, 2] or not all(
            isinstance(size, int) for size in sizes
        ):
            return f"has tensors of shapes {[list(shape) for shape in shapes]}, which are no VeRA's"
        numbers = [slot.settings.get(name) for name in (RANK, LARGEST_IN, LARGEST_OUT, MODULES)]
        if not all(type(number) is int and number > 0 for number in numbers):
            return f"has settings {slot.settings}, which are no VeRA's"
        in_features, out_features = self.features(slot)
        return difference(
            slot, new_slot(slot.module, in_features, out_features, slot.settings, slot.activation_axes)
        )

    def features(self, slot: Slot) -> tuple[int, int]:
        """What the slot's module reads and makes: in_features and out_features."""
        return int(slot.tensor(A).shape[1]), int(slot.tensor(B).shape[0])

    def weight_shape(self, slot: Slot) -> tuple[int, ...]:
        return self.features(slot)[::-1]

    def owns(self, key: str) -> bool:
        return key in self.shared or super().owns(key)

    def settings(self, adapter: Held, module: str) -> Settings:
        return {RANK: self.rank(adapter.tensors, module)}

    def rank(self, tensors: Tensors, module: str) -> int:
        tensor = tensors.get(f"{PREFIX}{module}.{D}")
        return 0 if tensor is None else int(tensor.size)

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        check_number(origin, "r", config.get("r", 256), integer=True)
        for name, default in {"bias": "none", "fan_in_fan_out": False}.items():
            if (value := config.get(name, default)) != default:
                raise AdapterError(
                    f"{origin}: {name}={value!r} is not supported: train the adapter without it, or merge it"
                )
        if not isinstance(saved := config.get("save_projection", True), bool):
            raise AdapterError(f"{origin}: save_projection is {saved!r}, expected true or false")
        key = config.get(_PRNG_KEY, _KEY)
        if not saved and not (type(key) is int and 0 <= key <= _LARGEST_KEY):
            raise AdapterError(
                f"{origin}: projection_prng_key is {key!r}, expected a whole number up to {_LARGEST_KEY}: "
                "save the adapter with save_projection=True"
            )

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        rank = config.get("r", 256)
        for key, value in tensors.items():
            if key.endswith(self.suffixes) and value.ndim != 1:
                raise AdapterError(f"{origin}: tensor {key} has {value.ndim} axes, expected 1")
            if key.endswith(D) and value.size != rank:
                raise AdapterError(
                    f"{origin}: tensor {key} has {value.size} values, the configuration r={rank}"
                )
        if config.get("save_projection", True) and self.modules(tensors):
            for name, key in _SHARED.items():
                matrix = tensors.get(key)
                if matrix is None:
                    raise AdapterError(
                        f"{origin}: holds no {key}, which save_projection says it does: say "
                        "save_projection=false where PEFT drew it from projection_prng_key"
                    )
                if matrix.ndim != 2 or matrix.shape[0 if name == A else 1] != rank:
                    raise AdapterError(f"{origin}: tensor {key} is {list(matrix.shape)}, the rank is {rank}")
        return super().check(config, tensors, origin)

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        found = super().values(slot, adapter)
        if not found:
            return {}
        in_features, out_features = self.features(slot)
        a, b = self._pair(slot, adapter)
        return found | {
            slot.input(A): np.ascontiguousarray(a[:, :in_features]),
            slot.input(B): np.ascontiguousarray(b[:out_features]),
        }

    def fit(self, slot: Slot, adapter: Held) -> None:
        super().fit(slot, adapter)
        a, b = self._pair(slot, adapter)
        sizes = self.features(slot)
        if (a.shape[1] < sizes[0]) or (b.shape[0] < sizes[1]):
            raise AdapterError(
                f"{adapter.origin}: module {slot.module} is {sizes[0]} -> {sizes[1]} features, more than the "
                f"{a.shape[1]} of {A} or the {b.shape[0]} of {B}: the adapter was made for another base"
            )

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """As PEFT: `lambda_b` zero, `lambda_d` 0.1, and the pair, once for all slots."""
        del size, rng, read_weight
        in_features, out_features = (int(slot.settings[name]) for name in (LARGEST_IN, LARGEST_OUT))
        rank = int(slot.settings[RANK])
        a, b = drawn(_KEY, rank, in_features, out_features)
        return {
            slot.input(B_SCALE): np.zeros(slot.tensor(B_SCALE).sized(0), np.float32),
            slot.input(D): np.full(rank, _INITIAL_D, np.float32),
            _SHARED[A]: a,
            _SHARED[B]: b,
        }

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """With the slots' rank."""
        return {
            "r": int(slots[0].settings[RANK]) if slots else size,
            _PRNG_KEY: _KEY,
            "save_projection": True,
            "vera_dropout": 0.0,
            "d_initial": _INITIAL_D,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_weights": True,
        }

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        """Where PEFT draws the same pair again: the parts of one that it does not draw are not the whole."""
        slots = [slot for slot, _ in values]
        for slot, tensors in values:
            in_features, out_features = self.features(slot)
            largest = (int(slot.settings[name]) for name in (LARGEST_IN, LARGEST_OUT))
            a, b = drawn(_KEY, int(slot.settings[RANK]), *largest)
            same = np.array_equal(tensors[slot.input(A)], a[:, :in_features]) and np.array_equal(
                tensors[slot.input(B)], b[:out_features]
            )
            if not same or len(slots) != slot.settings[MODULES]:
                raise AdapterError(
                    f"{origin}: module {slot.module}: has parts of {A} and {B} that PEFT does not draw from "
                    "its default key: use the adapter's folder"
                )
        return self.fresh_config(0, slots) | {"save_projection": False}

    def stirred(self, tensors: Tensors, rng: np.random.Generator, scale: float) -> dict[str, FloatArray]:
        """The vectors alone."""
        found = super().stirred(tensors, rng, scale)
        return found | {key: tensors[key] for key in self.shared if key in tensors}

    def has_effect(self, adapter: Held) -> bool:
        return any(
            adapter.tensors[f"{PREFIX}{module}.{B_SCALE}"].any()
            and adapter.tensors[f"{PREFIX}{module}.{D}"].any()
            for module in self.modules(adapter.tensors)
        )

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        pair = [slot.input(name) for name in (A, B)]
        several = not slot.activation_axes or any(np.count_nonzero(row) > 1 for row in weights)
        if (
            not adapters
            or several
            or any(not np.array_equal(adapters[0][name], item[name]) for item in adapters for name in pair)
        ):
            return super().rows(slot, adapters, weights, read_weight)
        found = {name: adapters[0][name] for name in pair}
        for name in (B_SCALE, D):
            vectors = np.zeros((len(weights), *slot.tensor(name).sized(0)), np.float32)
            for vector, row in zip(vectors, weights, strict=True):
                for item, weight in zip(adapters, row, strict=True):
                    if weight:
                        vector[:] = item[slot.input(name)] * (weight if name == B_SCALE else 1)
            found[slot.input(name)] = vectors.reshape(len(weights), *(1,) * (slot.activation_axes - 2), -1)
        return found

    def _pair(self, slot: Slot, adapter: Held) -> tuple[FloatArray, FloatArray]:
        """The file's, or as PEFT draws it for the modules of the bundle's slots.

        Raises:
            AdapterError: PEFT drew it for other modules, whose sizes are not known here.
        """
        if adapter.config.get("save_projection", True):
            return adapter.tensors[_SHARED[A]], adapter.tensors[_SHARED[B]]
        modules = self.modules(adapter.tensors)
        if len(modules) != slot.settings[MODULES]:
            raise AdapterError(
                f"{adapter.origin}: is on {len(modules)} modules, the bundle has slots on "
                f"{slot.settings[MODULES]}, and without {A} and {B} in the file PEFT draws them by the "
                "largest of its modules: save the adapter with save_projection=True"
            )
        largest = (int(slot.settings[name]) for name in (LARGEST_IN, LARGEST_OUT))
        return drawn(adapter.config.get(_PRNG_KEY, _KEY), int(slot.settings[RANK]), *largest)


TECHNIQUE = Vera()
