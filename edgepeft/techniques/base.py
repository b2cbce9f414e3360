"""What a technique is: the meaning of a slot's tensors in an adapter's file and in the graphs."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError
from ..slots import EMPTY, ONES, PREFIX, SIZE, ZEROS, Slot, SlotTensor

SCALING = "scaling"
"""What a slot's tensor is called that is a factor of the others."""
RANK = "rank"
"""A slot's setting, where its rank is fixed at export."""
FloatArray: TypeAlias = npt.NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, FloatArray]
"""By PEFT's state-dict key in PEFT's layout, or by the graphs' input in theirs."""
ReadWeight: TypeAlias = Callable[[str], FloatArray]
"""Reads a tensor of `weights.bin`."""
Settings: TypeAlias = Mapping[str, bool | int | float | str]
"""What a slot has fixed at export beside the sizes of its module; see `Slot.settings`."""


class Held(Protocol):
    """What a technique sees of an adapter; see `edgepeft.adapters.Adapter`."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, FloatArray]: ...
    @property
    def origin(self) -> str: ...
    def scaling(self, module: str) -> float:
        """The factor that the configuration gives the module."""


class Technique(abc.ABC):
    """What the exporter and the device know of a technique beside its graphs.

    Where a method says nothing else, values are float32 by input name, as the graphs take them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """In messages, such as `takes no LoRA`."""
    apart: ClassVar[str] = "is filled once for all rows, so the rows of a batch cannot differ in it"
    """Why the rows of a batch cannot have adapters of their own, after `module NAME`."""
    parts: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Tensors of a slot that may be chosen to train without its others, by what the choice is called."""
    weighted: ClassVar[str | None] = None
    """The tensor that an adapter's weight multiplies, where it may have one other than 1."""
    by_row: ClassVar[Sequence[str]] = ()
    """Tensors of a slot that have an axis for the rows of a batch in front where `rows` makes them differ."""

    def in_decoder(self, module: str) -> bool:
        """Whether the decoder's graph has the slot on the module, whose cache may begin with it instead."""
        del module
        return True

    @abc.abstractmethod
    def problem(self, slot: Slot) -> str | None:
        """What of a manifest's slot is not as this technique makes it; None if all is."""

    @abc.abstractmethod
    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        """What the adapter has in the slot, each array contiguous; nothing where it has nothing there."""

    def write(self, slot: Slot, values: Tensors) -> dict[str, FloatArray]:
        """Those values that PEFT's file has, copied, by PEFT's key and in PEFT's layout."""
        return {
            tensor.key: np.ascontiguousarray(value.T) if tensor.transposed else value.copy()
            for tensor in slot.tensors
            if tensor.key is not None and (value := values.get(tensor.input)) is not None
        }

    def size(self, slot: Slot, values: Tensors) -> int:
        """The size that the values have in the slot; 0 where a slot has none to choose."""
        for tensor in slot.tensors:
            if SIZE in tensor.shape:
                return int(values[tensor.input].shape[tensor.shape.index(SIZE)])
        return 0

    def neutral(self, slot: Slot, read_weight: ReadWeight) -> dict[str, FloatArray]:
        """What the slot is fed where no adapter has anything in it."""
        return {tensor.input: _neutral(tensor, read_weight) for tensor in slot.tensors}

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """What the slot is fed for the adapters that have something in it, each times its weight.

        Raises:
            AdapterError: there are several, or one not as it is, and the technique does not define that.
        """
        if not weighted:
            return self.neutral(slot, read_weight)
        values, weight = weighted[0]
        if len(weighted) > 1 or (weight != 1 and self.weighted is None):
            raise AdapterError(
                f"module {slot.module}: {self.title} of several adapters, or with a weight, cannot be mixed: "
                "use one that has it, with weight 1"
            )
        found = {name: values[name] for name in slot.inputs}
        if weight != 1 and self.weighted is not None:
            name = slot.input(self.weighted)
            found[name] = found[name] * np.float32(weight)
        return found

    def rows(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """What the slot is fed for a batch whose rows have adapters of their own.

        Args:
            slot: the slot.
            adapters: those that have something in it.
            weights: `[rows, adapters]`; 0 where an adapter is not the row's.
            read_weight: reads what is fed for none.

        Raises:
            AdapterError: rows differ, and the graphs cannot tell them apart here.
        """
        distinct = list(dict.fromkeys(map(tuple, weights.tolist())))
        values = [
            self.mixed(
                slot,
                [(adapter, weight) for adapter, weight in zip(adapters, row, strict=True) if weight],
                read_weight,
            )
            for row in distinct
        ]
        if any(not np.array_equal(values[0][name], other[name]) for other in values for name in values[0]):
            raise AdapterError(
                f"module {slot.module} {self.apart}: run the adapters that differ there one at a time"
            )
        return values[0]

    def stacked(
        self, slot: Slot, adapters: Sequence[Tensors], weights: FloatArray, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """What every row of a batch is fed for itself, one below the other: `[rows, …]`; see `rows`."""
        values = [
            self.mixed(
                slot,
                [(item, weight) for item, weight in zip(adapters, row, strict=True) if weight],
                read_weight,
            )
            for row in weights.tolist()
        ]
        return {name: np.stack([each[name] for each in values]) for name in slot.inputs}


class PeftTechnique(Technique):
    """A technique that PEFT has a type of adapters for: `peft_type` in their configuration.

    What is said here holds where all of an adapter's tensors on a module are those of one slot, by keys that
    end as `suffixes` say, and of fixed sizes.
    """

    peft_type: ClassVar[str]
    """Its name in capitals."""
    inert: ClassVar[str]
    """When an adapter's tensors change nothing, in a message."""
    bias_of_targets: ClassVar[str | None] = None
    """PEFT's option `bias` where the target modules' own biases train too; None: there is no such option."""
    saves_modules: ClassVar[bool] = True
    """Whether PEFT's configuration of the type has the option `modules_to_save`."""
    suffixes: ClassVar[tuple[str, ...]]
    """What follows the module's name in the key of each tensor."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Keys of tensors that are of no module."""

    def has_effect(self, adapter: Held) -> bool:
        """Whether the adapter's tensors change what the model computes: here, any number but zero does."""
        return any(bool(value.any()) for key, value in adapter.tensors.items() if self.owns(key))

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration of the type is this technique's, where several have the type."""
        del config
        return True

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        """Check an adapter's configuration.

        Raises:
            AdapterError: it is none of this technique's, or asks for what the graphs do not compute.
        """

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        """Check an adapter's tensors, by PEFT's keys, with one another and with its configuration.

        Returns:
            The factor that the configuration gives each module; none where a technique has no factors.

        Raises:
            AdapterError: names the tensor or module.
        """
        del config
        stems = [
            key.removesuffix(suffix) for suffix in self.suffixes for key in tensors if key.endswith(suffix)
        ]
        for module in (stem.removeprefix(PREFIX) for stem in dict.fromkeys(stems)):
            for suffix in self.suffixes:
                if f"{PREFIX}{module}{suffix}" not in tensors:
                    raise AdapterError(f"{origin}: module {module} has no {suffix[1:]}")
        return {}

    def from_file(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
        """The tensors of PEFT's file by keys as the slots have them, where those are others.

        Raises:
            AdapterError: one cannot be taken apart.
        """
        del config, origin
        return dict(tensors)

    def to_file(self, tensors: Tensors) -> dict[str, FloatArray]:
        """The other way."""
        return dict(tensors)

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        stored = {
            tensor: adapter.tensors.get(tensor.key) for tensor in slot.tensors if tensor.key is not None
        }
        return {
            tensor.input: np.ascontiguousarray(value.T if tensor.transposed else value)
            for tensor, value in stored.items()
            if value is not None
        }

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """Tensors by PEFT's key, in PEFT's layout, that a new adapter of this size begins with."""
        del size, rng
        return self.write(slot, self.neutral(slot, read_weight))

    def first_size(self, size: int) -> int:
        """The size of the tensors that a new adapter begins with which is to have this one in the end."""
        return size

    def fresh_config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        """What PEFT's configuration of a new adapter of this size, in these slots, has of the technique's."""
        del size, slots
        return {}

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        """The same of an adapter with these values in these slots.

        Raises:
            AdapterError: no configuration says so.
        """
        del origin
        return self.fresh_config(0, [slot for slot, _ in values])

    def stirred(self, tensors: Tensors, rng: np.random.Generator, scale: float) -> dict[str, FloatArray]:
        """An adapter's tensors with normal noise of this deviation in what keeps a fresh one from having an
        effect."""
        return {
            key: (value + scale * rng.standard_normal(value.shape)).astype(np.float32)
            if self.owns(key)
            else value
            for key, value in tensors.items()
        }

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        """The modules that an adapter with these tensors is on."""
        first = self.suffixes[0]
        return tuple(key[len(PREFIX) : -len(first)] for key in tensors if key.endswith(first))

    def settings(self, adapter: Held, module: str) -> Settings:
        """What a slot on the module has to have fixed for the adapter."""
        del adapter, module
        return {}

    def owns(self, key: str) -> bool:
        """Whether a key is one of the technique's, and not of a parameter that is stored whole."""
        return key.endswith(self.suffixes)

    def rank(self, tensors: Tensors, module: str) -> int:
        """The size of an adapter's slot on the module; 0 where it has none to choose, or nothing there."""
        del tensors, module
        return 0

    def weight_shape(self, slot: Slot) -> tuple[int, ...] | None:
        """The shape, in PyTorch, of the base's weight that the slot is beside; None: it may be any."""
        del slot
        return None

    def fit(self, slot: Slot, adapter: Held) -> None:
        """Check that what the adapter has on the slot's module is of the slot's sizes, where they are not its
        own to choose.

        Raises:
            AdapterError: names both.
        """
        for tensor in slot.tensors:
            if tensor.key is None:
                continue
            expected = tensor.shape[::-1] if tensor.transposed else tensor.shape
            shape = adapter.tensors[tensor.key].shape
            alike = (size in (SIZE, own) for size, own in zip(expected, shape, strict=False))
            if len(shape) != len(expected) or not all(alike):
                raise AdapterError(
                    f"{adapter.origin}: module {slot.module}: {tensor.name} is {list(shape)} in the adapter, "
                    f"{list(expected)} in this bundle: the adapter was made for another base"
                )

    def fit_settings(self, slot: Slot, adapter: Held, names: Iterable[str]) -> None:
        """Check that these of the settings that the adapter needs are the slot's.

        Raises:
            AdapterError: names the first that differs.
        """
        needed = self.settings(adapter, slot.module)
        for name in names:
            own, there = needed[name], slot.settings[name]
            if own != there:
                raise AdapterError(
                    f"{adapter.origin}: {name} is {own} in the adapter, {there} in this bundle's slot on "
                    f"{slot.module}: export the base together with this adapter"
                )


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """As `kaiming_uniform_(a=sqrt(5))` draws a matrix `[out, in]`: within 1 / sqrt(in)."""
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def difference(slot: Slot, expected: Slot) -> str | None:
    """Where a manifest's slot differs from what its technique makes of the same module; None: nowhere.

    An input has PEFT's key for its name, if it has a key; any other may have any name.
    """
    names, wanted = [item.name for item in slot.tensors], [item.name for item in expected.tensors]
    if names != wanted:
        return f"has the tensors {names}, expected {wanted}"
    for got, item in zip(slot.tensors, expected.tensors, strict=True):
        for field, value in vars(item).items():
            if getattr(got, field) != value and (field != "input" or item.key is not None):
                return f"has {field} {getattr(got, field)!r} for {item.name}, expected {value!r}"
    for field in ("site", "settings", "activation_axes"):
        if getattr(slot, field) != getattr(expected, field):
            return f"has {field} {getattr(slot, field)!r}, expected {getattr(expected, field)!r}"
    return None


def _neutral(tensor: SlotTensor, read_weight: ReadWeight) -> FloatArray:
    if tensor.neutral in (ZEROS, ONES):
        return np.full(tensor.sized(0), tensor.neutral == ONES, np.float32)
    return np.zeros(tensor.sized(0), np.float32) if tensor.neutral == EMPTY else read_weight(tensor.neutral)
