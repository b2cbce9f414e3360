"""Large tensors in scratch files, so that memory holds only what is being worked on.

The kernel reads the pages of a mapped file when they are used and drops them when memory is short. A file has
no name: it goes with its tensor, also when the process is killed.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import torch

from edgepeft.errors import ExportError

#: Smaller tensors stay in memory; in values, those that are converted at a time.
LEAST_BYTES, CHUNK_VALUES = 2**20, 2**18


def spooled(shape: Sequence[int], dtype: torch.dtype, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """A tensor that is made of `parts`, one behind the other, each of `dtype`.

    It is in memory where it is small, and on Windows, which removes no file that is mapped. What is written
    to it later is kept in memory, too.

    Raises:
        ExportError: the folder of temporary files has no room.
    """
    size = torch.Size(shape).numel()
    if size * dtype.itemsize < LEAST_BYTES or sys.platform == "win32":
        whole = torch.empty(size, dtype=dtype)
        # By numpy: torch's threads wait for each other at every part, which takes longer than to copy it.
        filled, first = whole.numpy(), 0
        for part in parts:
            filled[first : first + part.numel()] = part.contiguous().numpy().reshape(-1)
            first += part.numel()
        return whole.reshape(tuple(shape))
    try:
        with tempfile.TemporaryFile() as file:
            for part in parts:
                part.contiguous().numpy().tofile(file)
            name = f"/dev/fd/{file.fileno()}"
            return torch.from_file(name, shared=False, size=size, dtype=dtype).reshape(tuple(shape))
    except OSError as error:
        raise ExportError(
            f"{tempfile.gettempdir()}: no room for weights in work ({error.strerror or error}): free "
            "some space, or name another folder in TMPDIR"
        ) from error


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as one of another type, contiguous; itself where it is that already."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    rows = max(1, CHUNK_VALUES * len(tensor) // max(1, tensor.numel())) if tensor.ndim else 1

    def parts() -> Iterator[torch.Tensor]:
        # One buffer for all: what is freed between small things that stay goes back to no one.
        buffer = None
        for part in tensor.split(rows) if tensor.ndim else (tensor,):
            buffer = torch.empty(part.shape, dtype=dtype) if buffer is None else buffer
            yield buffer[: len(part)].copy_(part) if part.ndim else buffer.copy_(part)

    return spooled(tensor.shape, dtype, parts())
