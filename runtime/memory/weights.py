"""The weight file as memory that the kernel reads when it is touched and may drop at any time."""

import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import TensorSpec
from edgepeft.bundle.reader import Bundle


class MappedWeights:
    """Tensors of `weights.bin`, mapped: they cost memory only while they are read.

    Args:
        bundle: the bundle.
        stays: `release` leaves the pages in the process.
    """

    def __init__(self, bundle: Bundle, *, stays: bool = False) -> None:
        self._stays = stays
        self._weights = bundle.manifest.weights
        with bundle.file(bundle.manifest.weights_file).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, name: str, spec: TensorSpec) -> npt.NDArray[np.generic]:
        """The bytes of a weight as `spec` wants to read them: its dtype and shape, the same number of bytes.

        Raises:
            ValueError: the weight has another number of bytes.
        """
        weight = self._weights[name]
        dtype = np.dtype(spec.dtype)
        flat = np.frombuffer(self._map, dtype, weight.nbytes // dtype.itemsize, weight.offset)
        return flat.reshape([int(dim) for dim in spec.shape])

    def rows(self, name: str, spec: TensorSpec, first: int, last: int) -> npt.NDArray[np.generic]:
        """Rows `first` to `last` (exclusive) of a weight whose rows have the shape that `spec` says."""
        columns = [int(dim) for dim in spec.shape[1:]]
        dtype, count = np.dtype(spec.dtype), math.prod(columns)
        offset = self._weights[name].offset + first * count * dtype.itemsize
        flat = np.frombuffer(self._map, dtype, (last - first) * count, offset)
        return flat.reshape([last - first, *columns])

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these weights while something else is computed; it may do so or not."""
        self._advise("MADV_WILLNEED", names)

    @contextmanager
    def by_rows(self, names: Iterable[str]) -> Iterator[None]:
        """While a `with` block reads scattered rows of these weights, do not read what lies around them.

        Readahead and what the kernel maps around a page bring 42 MiB of Qwen2.5-0.5B's embedding into the
        process for 128 rows of it.
        """
        names = list(names)
        self._advise("MADV_RANDOM", names)
        yield
        self._advise("MADV_NORMAL", names)

    def _advise(self, advice: str, names: Iterable[str]) -> None:
        option = getattr(mmap, advice, None)
        if option is None or not hasattr(self._map, "madvise"):
            return
        for weight in (self._weights[name] for name in names):
            start = weight.offset - weight.offset % mmap.PAGESIZE
            self._map.madvise(option, start, weight.offset + weight.nbytes - start)

    def release(self) -> None:
        """Take every page out of this process; a later read brings it back from the cache or the disk."""
        if not self._stays and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
