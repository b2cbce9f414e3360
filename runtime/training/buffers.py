"""One flat float32 buffer each for parameters, gradients and moments, with the tensors as views into them."""

import math
import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES, OptimizerState
from edgepeft.errors import EdgePeftError

FloatArray = npt.NDArray[np.float32]

_ALIGNMENT_VALUES = 16  # 64 bytes, what onnxruntime's kernels read fastest


class TrainingState:
    """The trained tensors and what the optimizer keeps of them.

    Graphs read `parameters` and write `gradients` in place; the optimizer runs over the flat buffers. The
    gaps between tensors stay zero under AdamW, because their gradients are.

    Args:
        tensors: starting values by graph input name, in the graphs' layout.
        file_in: folder of a nameless file that everything is mapped from; None keeps it in memory.
        optimizer: what the optimizer keeps of each value; None for a way to train that has neither gradients
            nor moments.

    Attributes:
        param, grad: float32, flat; no gradients without an optimizer.
        moments: the optimizer's buffers by the names that its graph gives them, flat.
        parameters, gradients: views of tensors, by name.
        start: the values that the update began with, by name.
        count: values of all tensors.

    Raises:
        EdgePeftError: the file cannot be made.
    """

    def __init__(
        self,
        tensors: Mapping[str, FloatArray],
        file_in: Path | None = None,
        optimizer: OptimizerState | None = OPTIMIZER_STATES["32bit"],
    ) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        size, alignment = 0, max(_ALIGNMENT_VALUES, 1 if optimizer is None else optimizer.block)
        for name, tensor in tensors.items():
            self._places[name] = (size, tensor.shape)
            size += -(-tensor.size // alignment) * alignment
        layout = {"param": (size, "float32"), "start": (size, "float32")}
        layout["grad"] = (0 if optimizer is None else size, "float32")
        of_optimizer = {} if optimizer is None else optimizer.buffers
        layout |= {name: (size // item.values, item.dtype) for name, item in of_optimizer.items()}
        self._file: mmap.mmap | None = None
        self._take(self._zeros(layout, file_in))
        for name, tensor in tensors.items():
            self.parameters[name][...] = tensor
            self.start[name][...] = tensor
        self.release()
        self.count = sum(tensor.size for tensor in tensors.values())

    def _zeros(self, layout: Mapping[str, tuple[int, str]], folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return {name: np.zeros(count, dtype) for name, (count, dtype) in layout.items()}
        total = sum(count * np.dtype(dtype).itemsize for count, dtype in layout.values())
        self._file = _mapped_file(folder, max(total, 1))
        buffers, offset = {}, 0
        for name, (count, dtype) in layout.items():
            buffers[name] = np.frombuffer(self._file, dtype, count, offset)
            offset += buffers[name].nbytes
        return buffers

    def move_to_file(self, folder: Path) -> None:
        """Have everything mapped from a nameless file from now on; views handed out before are stale.

        Raises:
            EdgePeftError: the file cannot be made.
        """
        before = self._buffers
        layout = {name: (len(buffer), buffer.dtype.name) for name, buffer in before.items()}
        self._take(self._zeros(layout, folder))
        for name, buffer in before.items():
            self._buffers[name][...] = buffer
        self.release()

    def _take(self, buffers: dict[str, Any]) -> None:
        self._buffers = buffers
        self.param, self.grad = buffers["param"], buffers["grad"]
        self.moments = {
            name: buffer for name, buffer in buffers.items() if name not in ("param", "grad", "start")
        }
        self.parameters, self.start = self._views(self.param), self._views(buffers["start"])
        self.gradients = self._views(self.grad) if len(self.grad) else {}

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
