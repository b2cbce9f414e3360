"""One flat float32 buffer each for parameters, gradients and moments, with the tensors as views into them."""

import math
import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepeft.errors import EdgePeftError

FloatArray = npt.NDArray[np.float32]

# Parameters, gradients, two moments and the starting values.
_BUFFERS = 5
_ALIGNMENT_VALUES = 16  # 64 bytes, what onnxruntime's kernels read fastest


class TrainingState:
    """The trained tensors, their gradients, and what AdamW keeps of them.

    Graphs read `parameters` and write `gradients` in place; the optimizer runs over the flat buffers. The
    gaps between tensors stay zero under AdamW, because their gradients are. `start` holds the values that
    the update began with.

    Args:
        tensors: starting values by graph input name, in the graphs' layout.
        file_in: folder of a nameless file that everything is mapped from; None keeps it in memory.

    Raises:
        EdgePeftError: the file cannot be made.
    """

    def __init__(self, tensors: Mapping[str, FloatArray], file_in: Path | None = None) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        size = 0
        for name, tensor in tensors.items():
            self._places[name] = (size, tensor.shape)
            size += -(-tensor.size // _ALIGNMENT_VALUES) * _ALIGNMENT_VALUES
        self._file = None if file_in is None else _mapped_file(file_in, _BUFFERS * 4 * max(size, 1))
        self.param, self.grad, self.exp_avg, self.exp_avg_sq, start = self._zeros(size)
        self.parameters, self.gradients = self._views(self.param), self._views(self.grad)
        self.start = self._views(start)
        for name, tensor in tensors.items():
            self.parameters[name][...] = tensor
            self.start[name][...] = tensor
        self.release()
        self.count = sum(tensor.size for tensor in tensors.values())

    def _zeros(self, size: int) -> list[FloatArray]:
        if self._file is None:
            return [np.zeros(size, np.float32) for _ in range(_BUFFERS)]
        return list(np.frombuffer(self._file, np.float32, _BUFFERS * size).reshape(_BUFFERS, size))

    def release(self) -> None:
        """Take what is mapped out of the process; the system writes it back when it wants the memory."""
        if self._file is not None and hasattr(self._file, "madvise"):
            self._file.madvise(mmap.MADV_DONTNEED)

    def _views(self, flat: FloatArray) -> dict[str, FloatArray]:
        return {
            name: flat[offset : offset + int(np.prod(shape))].reshape(shape)
            for name, (offset, shape) in self._places.items()
        }

    def relative_change(self) -> float:
        """L2 norm of the update divided by that of what it started from."""
        start = change = 0.0
        for name, before in self.start.items():
            start += float(np.sum(np.square(before, dtype=np.float64)))
            change += float(np.sum(np.square(self.parameters[name] - before, dtype=np.float64)))
            self.release()
        return math.sqrt(change / start) if start else (0.0 if change == 0.0 else math.inf)

    def limit_change(self, limit: float) -> bool:
        """Scale the update back to `limit` times the norm of its start; whether that was necessary."""
        change = self.relative_change()
        if change <= limit:
            return False
        scale = np.float32(limit / change)
        for name, before in self.start.items():
            parameter = self.parameters[name]
            parameter -= before
            parameter *= scale
            parameter += before
        return True


def _mapped_file(folder: Path, nbytes: int) -> mmap.mmap:
    """A writable map of zeros in a file without a name, which goes when the map does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise EdgePeftError(
            f"{folder}: no file of {nbytes:,} B for the training state can be made there "
            f"({error.strerror or error}): free the disk, or give a larger --budget"
        ) from error
