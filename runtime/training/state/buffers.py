"""Parameters, gradients and moments as flat buffers, in memory or in a file, with the tensors as parts of
them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES, OptimizerState
from edgepeft.errors import UpdateRejectedError

from ...memory.planner import CHUNK_VALUES
from .file import file_buffers

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

_ALIGNMENT_VALUES = 16  # 64 bytes, what onnxruntime's kernels read fastest
_NOTHING: Mapping[str, FloatArray] = MappingProxyType({})


class Buffer(Protocol):
    """A flat buffer of numbers, read and written in pieces."""

    dtype: np.dtype[Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Array:
        """Entries `start` to `stop` (exclusive, or the end): a view of what is in memory, else a copy."""

    def write(self, start: int, values: Array) -> None:
        """Replace the entries from `start` on."""


class _MemoryBuffer:
    """A buffer in memory."""

    def __init__(self, array: Array) -> None:
        self.array, self.dtype = array, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> Array:
        return self.array[start:stop]

    def write(self, start: int, values: Array) -> None:
        self.array[start : start + len(values)] = values


class _PassingBuffer:
    """A buffer of zeros that has in memory what was written and not dropped yet, and no more."""

    def __init__(self, count: int) -> None:
        self.dtype = np.dtype(np.float32)
        self._count = count
        self._written: dict[int, Array] = {}

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Array:
        values = np.zeros(min(stop, self._count) - start, self.dtype)
        for first, written in self._written.items():
            low, high = max(start, first), min(start + len(values), first + len(written))
            if low < high:
                values[low - start : high - start] = written[low - first : high - first]
        return values

    def write(self, start: int, values: Array) -> None:
        """Replace entries that were not written yet, or exactly those that were at once."""
        self._written[start] = values.copy()

    def drop(self, start: int) -> None:
        """Have zeros again where something was written from `start` on."""
        del self._written[start]


class TrainingState:
    """The trained tensors and what the optimizer keeps of them.

    The optimizer runs over the flat buffers. The gaps between tensors stay zero under AdamW, because their
    gradients are.

    Args:
        tensors: starting values by graph input name, in the graphs' layout.
        file_in: folder of a nameless file that holds everything; None keeps it in memory.
        optimizer: what the optimizer keeps of each value; None for a way to train that has neither gradients
            nor moments.
        adds_up: there is room to add up the gradients of several batches.
        passing: gradients are not kept; see `pass_gradients`.
        averages: names of what a technique keeps of each value, float32.

    Attributes:
        buffers: `param`, `start` (the values that the update began with), float32; `grad` and, with
            `adds_up`, `total`, float32, of no length without an optimizer; and the optimizer's, by the names
            that its graph gives them.
        moments: the names of the optimizer's and of the averages.
        parameters, gradients: the trained tensors as they are now and their gradients, by name: views of what
            is in memory, else read when they are asked for.
        size: entries of `param`, gaps included.
        count: values of all tensors.

    Raises:
        EdgePeftError: the file cannot be made.
    """

    def __init__(
        self,
        tensors: Mapping[str, FloatArray],
        file_in: Path | None = None,
        optimizer: OptimizerState | None = OPTIMIZER_STATES["32bit"],
        *,
        adds_up: bool = False,
        passing: bool = False,
        averages: Sequence[str] = (),
    ) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size, self._alignment = 0, max(_ALIGNMENT_VALUES, 1 if optimizer is None else optimizer.block)
        for name, tensor in tensors.items():
            self._places[name] = (self.size, tensor.shape)
            self.size = self._end(name)
        self.count = sum(tensor.size for tensor in tensors.values())
        of_gradients = 0 if optimizer is None else self.size
        of_optimizer = {} if optimizer is None else optimizer.buffers
        self.moments = (*of_optimizer, *averages)
        self._layout = {"param": (self.size, "float32"), "start": (self.size, "float32")}
        if not passing:
            self._layout["grad"] = (of_gradients, "float32")
        if adds_up:
            self._layout["total"] = (of_gradients, "float32")
        self._layout |= {name: (self.size // item.values, item.dtype) for name, item in of_optimizer.items()}
        self._layout |= dict.fromkeys(averages, (self.size, "float32"))
        self.buffers: dict[str, Buffer]
        if file_in is None:
            self.buffers = {
                name: _MemoryBuffer(np.zeros(count, dtype)) for name, (count, dtype) in self._layout.items()
            }
        else:
            self.buffers = dict(file_buffers(file_in, self._layout))
        if passing:
            self.buffers["grad"] = _PassingBuffer(of_gradients)
        self._name_tensors()
        for name, tensor in tensors.items():
            for kind in ("param", "start"):
                self.buffers[kind].write(self._places[name][0], tensor.reshape(-1))

    def _name_tensors(self) -> None:
        self.parameters = self._tensors("param")
        self.gradients = self._tensors("grad") if len(self.buffers["grad"]) else {}

    def inputs(self, constants: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """All adapter inputs: the trained tensors as they are now, and the constants."""
        return self._tensors("param", constants)

    def average(self, kind: str, name: str) -> FloatArray:
        """What a technique's average has of a tensor, in its shape."""
        return _Tensors(self.buffers[kind], self._places, _NOTHING)[name]

    def put_gradient(self, name: str, values: FloatArray, *, add: bool = False) -> None:
        """Keep a tensor's gradient, or add to it."""
        buffer, (start, _) = self.buffers["grad"], self._places[name]
        flat = values.reshape(-1)
        buffer.write(start, buffer.read(start, start + len(flat)) + flat if add else flat)

    def pieces(self, names: Iterable[str] | None = None) -> Iterator[tuple[int, int]]:
        """Where pieces of the flat buffers begin and end that fit the processor's cache: of all of them, or
        of some tensors."""
        spans = [(0, self.size)]
        if names is not None:
            spans = []
            for start, name in sorted((self._places[name][0], name) for name in names):
                if spans and spans[-1][1] == start:
                    start = spans.pop()[0]
                spans.append((start, self._end(name)))
        for first, end in spans:
            for start in range(first, end, CHUNK_VALUES):
                yield start, min(start + CHUNK_VALUES, end)

    def _end(self, name: str) -> int:
        """Where the tensor's entries and the gap behind them end."""
        start, shape = self._places[name]
        return start + -(-math.prod(shape) // self._alignment) * self._alignment

    @property
    def passes_gradients(self) -> bool:
        """Whether gradients have to be taken as they come; see `pass_gradients`."""
        return isinstance(self.buffers["grad"], _PassingBuffer)

    def pass_gradients(self) -> None:
        """Keep, from now on, only gradients that were put and not dropped yet."""
        if "grad" in self._layout:
            count, _ = self._layout.pop("grad")
            self.buffers["grad"] = _PassingBuffer(count)
            self._name_tensors()

    def drop_gradients(self, names: Iterable[str]) -> None:
        """These were taken, of gradients that pass."""
        buffer = self.buffers["grad"]
        assert isinstance(buffer, _PassingBuffer)
        for name in names:
            buffer.drop(self._places[name][0])

    def move_to_file(self, folder: Path) -> None:
        """Have everything in a nameless file from now on, but gradients that pass; views handed out before
        are stale.

        Raises:
            EdgePeftError: the file cannot be made.
        """
        moved = file_buffers(folder, self._layout)
        for name, buffer in moved.items():
            for start in range(0, len(buffer), CHUNK_VALUES):
                buffer.write(start, self.buffers[name].read(start, start + CHUNK_VALUES))
        self.buffers |= moved
        self._name_tensors()

    def replace(self, name: str, values: FloatArray) -> None:
        """Have a tensor have other values."""
        self.buffers["param"].write(self._places[name][0], values.reshape(-1))

    def restart(self, name: str, values: FloatArray) -> None:
        """Have a tensor begin with other values."""
        self.replace(name, values)
        self.buffers["start"].write(self._places[name][0], values.reshape(-1))

    def return_to_start(self) -> None:
        """Have every tensor as it began."""
        for start, stop in self.pieces():
            self.buffers["param"].write(start, self.buffers["start"].read(start, stop))

    def relative_change(self) -> float:
        """L2 norm of the update divided by that of what it started from."""
        norm = change = 0.0
        for start, stop in self.pieces():
            before = self.buffers["start"].read(start, stop)
            norm += float(np.sum(np.square(before, dtype=np.float64)))
            after = self.buffers["param"].read(start, stop)
            change += float(np.sum(np.square(after - before, dtype=np.float64)))
        return math.sqrt(change / norm) if norm else (0.0 if change == 0.0 else math.inf)

    def limit_change(self, limit: float) -> bool:
        """Scale the update back to `limit` times the norm of its start; whether that was necessary.

        Raises:
            UpdateRejectedError: it started from zeros, of which there is no multiple.
        """
        change = self.relative_change()
        if math.isinf(change):
            raise UpdateRejectedError(
                f"an update may be {limit:g} times as large as what it starts from (the bundle's "
                "max_relative_change), which is zero here: start from an adapter that was trained, or from a "
                "bundle without this bound"
            )
        if change <= limit:
            return False
        scale = np.float32(limit / change)
        for start, stop in self.pieces():
            before, after = (self.buffers[name].read(start, stop) for name in ("start", "param"))
            self.buffers["param"].write(start, before + scale * (after - before))
        return True

    def _tensors(self, kind: str, others: Mapping[str, FloatArray] = _NOTHING) -> Mapping[str, FloatArray]:
        buffer = self.buffers[kind]
        tensors = _Tensors(buffer, self._places, others)
        return dict(tensors) if isinstance(buffer, _MemoryBuffer) else tensors


class _Tensors(Mapping[str, FloatArray]):
    """Parts of a buffer in their shapes, read when they are asked for; and other tensors.

    Args:
        buffer: the buffer.
        places: where each begins, and its shape.
        others: where names that have no place are found.
    """

    def __init__(
        self,
        buffer: Buffer,
        places: Mapping[str, tuple[int, tuple[int, ...]]],
        others: Mapping[str, FloatArray],
    ) -> None:
        self._buffer, self._places, self._others = buffer, places, others

    def __getitem__(self, name: str) -> FloatArray:
        if name not in self._places:
            return self._others[name]
        start, shape = self._places[name]
        return self._buffer.read(start, start + math.prod(shape)).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._others  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter({**self._others, **self._places})

    def __len__(self) -> int:
        return len({**self._others, **self._places})
