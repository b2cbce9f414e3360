"""The weight file as memory that the kernel reads when it is touched and may drop at any time."""

import math
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import TensorSpec
from edgepeft.bundle.reader import Bundle

Array = npt.NDArray[np.generic]


class MappedWeights:
    """Tensors of `weights.bin`, mapped: they cost memory only while they are read.

    The system is told what will be read, and to read nothing beside it: a page that is touched unannounced
    brings as much around it as the disk's readahead says (8 MiB were seen), and that pushes out what a tight
    cgroup still needs.

    Args:
        bundle: the bundle.
        stays: `release` leaves the pages in the process.
    """

    def __init__(self, bundle: Bundle, *, stays: bool = False) -> None:
        self._stays = stays
        self._weights = bundle.manifest.weights
        self._file = bundle.file(bundle.manifest.weights_file).open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._looked_up: dict[str, mmap.mmap] = {}
        _advise(self._map, "MADV_RANDOM")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def view(self, name: str, spec: TensorSpec) -> Array:
        """The bytes of a weight as `spec` wants to read them: its dtype and shape, the same number of bytes.

        Raises:
            ValueError: the weight has another number of bytes.
        """
        weight = self._weights[name]
        self.prefetch([name])
        return _array(self._map, spec, weight.offset, weight.nbytes).reshape([int(dim) for dim in spec.shape])

    def rows(self, name: str, spec: TensorSpec, first: int, last: int) -> Array:
        """Rows `first` to `last` (exclusive) of a weight whose rows have the shape that `spec` says."""
        columns = [int(dim) for dim in spec.shape[1:]]
        row_bytes = math.prod(columns) * np.dtype(spec.dtype).itemsize
        offset = self._weights[name].offset + first * row_bytes
        nbytes = (last - first) * row_bytes
        self._prefetch(offset, nbytes)
        return _array(self._map, spec, offset, nbytes).reshape([last - first, *columns])

    def looked_up(self, name: str, spec: TensorSpec, indices: npt.NDArray[np.integer]) -> Array:
        """A weight of which only the rows `indices` are there; as `view`, until the next `release`.

        Pages of the file would bring their neighbours into the process: 42 MiB of Qwen2.5-0.5B's embedding
        for 128 rows of it.
        """
        weight = self._weights[name]
        if name not in self._looked_up:
            self._looked_up[name] = _nothing(weight.nbytes)
        memory = self._looked_up[name]
        shape = [int(dim) for dim in spec.shape]
        row_bytes = weight.nbytes // shape[0]
        with memoryview(memory) as room:
            for index in {int(i) for i in indices.reshape(-1)}:
                start = (index + shape[0] if index < 0 else index) * row_bytes
                if 0 <= start < weight.nbytes:  # onnxruntime refuses what is outside, and says so better
                    self._file.seek(weight.offset + start)
                    self._file.readinto(room[start : start + row_bytes])
        return _array(memory, spec, 0, weight.nbytes).reshape(shape)

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these weights while something else is computed; it may do so or not."""
        for weight in (self._weights[name] for name in names):
            self._prefetch(weight.offset, weight.nbytes)

    def _prefetch(self, offset: int, nbytes: int) -> None:
        start = offset - offset % mmap.PAGESIZE
        _advise(self._map, "MADV_WILLNEED", start, offset + nbytes - start)

    def release(self) -> None:
        """Take every page out of this process; a later read brings it back from the cache or the disk."""
        for memory in self._looked_up.values():
            _advise(memory, "MADV_DONTNEED")
        if not self._stays:
            _advise(self._map, "MADV_DONTNEED")


def bound_weights(
    mapped: MappedWeights,
    inputs: Mapping[str, TensorSpec],
    weights: Mapping[str, str],
    lookups: Mapping[str, str] = MappingProxyType({}),
    context: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Array]:
    """What a stage's weight inputs are bound to.

    Args:
        mapped: the weights.
        inputs: the graph's.
        weights: see `Stage.weights`; those that this graph does not read are left out.
        lookups: see `Stage.lookups`.
        context: where lookups find their indices.
    """
    return {
        name: mapped.looked_up(key, inputs[name], context[lookups[name]])
        if name in lookups
        else mapped.view(key, inputs[name])
        for name, key in weights.items()
        if name in inputs
    }


def _nothing(nbytes: int) -> mmap.mmap:
    """Zeros that cost memory where they are written; shared ones would stay after `MADV_DONTNEED`."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(memory, "MADV_NOHUGEPAGE")
    return memory


def _array(memory: mmap.mmap, spec: TensorSpec, offset: int, nbytes: int) -> Array:
    dtype = np.dtype(spec.dtype)
    return np.frombuffer(memory, dtype, nbytes // dtype.itemsize, offset)


def _advise(memory: mmap.mmap, advice: str, *where: int) -> None:
    """Advice that this system knows, on a part or all of a map."""
    option = getattr(mmap, advice, None)
    if option is not None:
        memory.madvise(option, *where)
