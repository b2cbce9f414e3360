"""A training state in a file without a name (with one on Windows): read and written in pieces, never mapped.

Mapped, every page of it that a step touches costs a fault, and one more before it is written. Copied, none
of them counts as the process's memory.
"""

import errno
import io
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.errors import EdgePeftError

Array = npt.NDArray[Any]


def file_buffers(folder: Path, layout: Mapping[str, tuple[int, str]]) -> dict[str, "FileBuffer"]:
    """Buffers of zeros in one file, which goes with the last of them.

    Args:
        folder: where the file is made; made itself where it is missing.
        layout: entries and dtype of each buffer, by name.

    Raises:
        EdgePeftError: the file cannot be made, or has no room on the disk.
    """
    sizes = {name: count * np.dtype(dtype).itemsize for name, (count, dtype) in layout.items()}
    home = _Home(folder, sum(sizes.values()))
    buffers, offset = {}, 0
    for name, (count, dtype) in layout.items():
        buffers[name] = FileBuffer(home, offset, count, np.dtype(dtype))
        offset += sizes[name]
    return buffers


class _Home:
    """The file, closed when nobody holds this any more."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder = folder
        self.file = _new_file(folder, nbytes)
        weakref.finalize(self, self.file.close)


class FileBuffer:
    """A part of the file; see `Buffer`."""

    def __init__(self, home: _Home, offset: int, count: int, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._home, self._file = home, home.file
        self._offset, self._count = offset, count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Array:
        """See `Buffer.read`."""
        values = np.empty(min(stop, self._count) - start, self.dtype)
        self._seek(start)
        unread = values.view(np.uint8).data
        while unread:
            got = self._file.readinto(unread)
            if not got:
                raise EdgePeftError(f"{self._home.folder}: the file of the training state has become shorter")
            unread = unread[got:]
        return values

    def write(self, start: int, values: Array) -> None:
        """See `Buffer.write`.

        Raises:
            EdgePeftError: the disk takes no more.
        """
        self._seek(start)
        unwritten = np.ascontiguousarray(values, self.dtype).view(np.uint8).data
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            raise EdgePeftError(
                f"{self._home.folder}: the training state cannot be written ({error.strerror or error}): "
                "free the disk, or give a larger --budget"
            ) from error

    def _seek(self, start: int) -> None:
        self._file.seek(self._offset + start * self.dtype.itemsize)


def _reserve(file: io.FileIO, nbytes: int) -> None:
    """Take a file's room on the disk, where the system and the file system can; elsewhere a disk that is too
    full shows when the file is written."""
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except AttributeError:  # macOS and Windows
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _new_file(folder: Path, nbytes: int) -> io.FileIO:
    """A file of zeros without a name, its room on the disk taken."""
    file: io.FileIO | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed with its last buffer)
        file.truncate(nbytes)
        if nbytes:
            _reserve(file, nbytes)
    except OSError as error:
        if file is not None:
            file.close()
        raise EdgePeftError(
            f"{folder}: no file of {nbytes:,} B for the training state can be made there "
            f"({error.strerror or error}): free the disk, or give a larger --budget"
        ) from error
    return file
