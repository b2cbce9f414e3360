"""Tensors of the weight file as arrays, whichever way their bytes come into memory."""

import math
import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import TensorSpec
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.sizes_on_disk import PACKED

from .system import advise, discard, private_memory

Array = npt.NDArray[np.generic]


class Weights(ABC):
    """Tensors of `weights.bin`.

    Args:
        bundle: the bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._weights = bundle.manifest.weights
        self._path = bundle.file(bundle.manifest.weights_file)
        self._file = self._path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._looked_up: dict[str, mmap.mmap] = {}

    def view(self, name: str, spec: TensorSpec) -> Array:
        """The bytes of a weight as `spec` wants to read them, until the next `release`: its dtype and shape,
        the same number of bytes; those of a type below 8 bits, which numpy has not, one after the other.

        Raises:
            ValueError: the weight has another number of bytes.
        """
        weight = self._weights[name]
        return _shaped(self._array(spec, weight.offset, weight.nbytes), spec)

    def rows(self, name: str, spec: TensorSpec, first: int, last: int) -> Array:
        """Rows `first` to `last` (exclusive) of a weight whose rows have the shape that `spec` says."""
        place = self._place_of_rows(name, spec, first, last)
        return self._array(spec, *place).reshape([last - first, *(int(dim) for dim in spec.shape[1:])])

    def looked_up(self, name: str, spec: TensorSpec, indices: npt.NDArray[np.integer]) -> Array:
        """A weight of which only the rows `indices` are there; as `view`.

        Mapped pages of the file would bring their neighbours into the process: 42 MiB of Qwen2.5-0.5B's
        embedding for 128 rows of it.
        """
        weight = self._weights[name]
        if name not in self._looked_up:
            self._looked_up[name] = private_memory(weight.nbytes)
        memory = self._looked_up[name]
        shape = [int(dim) for dim in spec.shape]
        row_bytes = weight.nbytes // shape[0]
        with memoryview(memory) as room:
            for index in {int(i) for i in indices.reshape(-1)}:
                start = (index + shape[0] if index < 0 else index) * row_bytes
                if 0 <= start < weight.nbytes:  # onnxruntime refuses what is outside, and says so better
                    self._file.seek(weight.offset + start)
                    self._file.readinto(room[start : start + row_bytes])
        return _shaped(_as_array(memory, spec, 0, weight.nbytes), spec)

    def prefetch(self, names: Iterable[str]) -> None:
        """Have these weights read while something else is computed; it may be so or not."""
        for weight in (self._weights[name] for name in names):
            self._prefetch(weight.offset, weight.nbytes)

    def prefetch_rows(self, name: str, spec: TensorSpec, first: int, last: int) -> None:
        """The same for rows of a weight; see `rows`."""
        self._prefetch(*self._place_of_rows(name, spec, first, last))

    def release(self) -> None:
        """Let go of what was handed out since the last time."""
        for name, memory in list(self._looked_up.items()):
            if not discard(memory):
                del self._looked_up[name]

    def _place_of_rows(self, name: str, spec: TensorSpec, first: int, last: int) -> tuple[int, int]:
        row_bytes = math.prod(int(dim) for dim in spec.shape[1:]) * np.dtype(spec.dtype).itemsize
        return self._weights[name].offset + first * row_bytes, (last - first) * row_bytes

    def _array(self, spec: TensorSpec, offset: int, nbytes: int) -> Array:
        memory, start = self._memory(offset, nbytes)
        return _as_array(memory, spec, start, nbytes)

    @abstractmethod
    def _memory(self, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
        """Memory that holds these bytes of the file, and where in it they begin."""

    @abstractmethod
    def _prefetch(self, offset: int, nbytes: int) -> None:
        """Begin to read these bytes of the file."""


class MappedWeights(Weights):
    """The file as memory that the kernel reads when it is touched and may drop at any time.

    The system is told what will be read, and to read nothing beside it: a page that is touched unannounced
    brings as much around it as the disk's readahead says (8 MiB were seen), and that pushes out what a tight
    cgroup still needs.

    Args:
        bundle: the bundle.
        stays: `release` leaves the pages in the process.
    """

    def __init__(self, bundle: Bundle, *, stays: bool = False) -> None:
        super().__init__(bundle)
        self._stays = stays
        self._map = self._new_map()

    def release(self) -> None:
        """Take every page out of this process; a later read brings it back from the cache or the disk.

        Where a system takes none out of a map, it goes, with the last array of it, and there is a new one.
        """
        super().release()
        if not self._stays and not discard(self._map):
            self._map = self._new_map()

    def _new_map(self) -> mmap.mmap:
        memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        advise(memory, "MADV_RANDOM")
        return memory

    def _memory(self, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
        self._prefetch(offset, nbytes)
        return self._map, offset

    def _prefetch(self, offset: int, nbytes: int) -> None:
        start = offset - offset % mmap.PAGESIZE
        advise(self._map, "MADV_WILLNEED", start, offset + nbytes - start)


def bound_weights(
    source: Weights,
    inputs: Mapping[str, TensorSpec],
    weights: Mapping[str, str],
    lookups: Mapping[str, str] = MappingProxyType({}),
    context: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Array]:
    """What a stage's weight inputs are bound to.

    Args:
        source: the weights.
        inputs: the graph's.
        weights: see `Stage.weights`; those that this graph does not read are left out.
        lookups: see `Stage.lookups`.
        context: where lookups find their indices.
    """
    return {
        name: source.looked_up(key, inputs[name], context[lookups[name]])
        if name in lookups
        else source.view(key, inputs[name])
        for name, key in weights.items()
        if name in inputs
    }


def _shaped(array: Array, spec: TensorSpec) -> Array:
    return array if spec.dtype in PACKED else array.reshape([int(dim) for dim in spec.shape])


def _as_array(memory: mmap.mmap, spec: TensorSpec, offset: int, nbytes: int) -> Array:
    dtype = np.dtype(np.uint8 if spec.dtype in PACKED else spec.dtype)
    return np.frombuffer(memory, dtype, nbytes // dtype.itemsize, offset)
