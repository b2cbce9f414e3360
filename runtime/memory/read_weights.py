"""Weights that are read into buffers of their own, past the page cache, one stage ahead.

In a memory cgroup that has no room for the weights, every page that a map brings in pushes another one out
that the same step will want again, code and training state among them, and the kernel is busy with that. In
128 MiB a step of SmolLM2-135M's shape takes 1.2 s so, and 1.43 to 1.6 through a map.
"""

import contextlib
import io
import mmap
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BundleError

from .system import private_memory
from .weights import Weights

_Place = tuple[int, int]


class ReadWeights(Weights):
    """The file in buffers that hold what was read last.

    Args:
        bundle: the bundle.
        capacity_bytes: of the buffers that are kept; what is in use is never given up for it.
    """

    def __init__(self, bundle: Bundle, capacity_bytes: int) -> None:
        super().__init__(bundle)
        self._capacity_bytes = capacity_bytes
        self._direct = _open_directly(self._path)
        weakref.finalize(self, self._direct.close)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="edgepeft-weights")
        weakref.finalize(self, self._reader.shutdown, wait=False)
        self._coming: dict[_Place, tuple[mmap.mmap, Future[None]]] = {}
        self._in_use: dict[_Place, mmap.mmap] = {}
        self._resting: dict[_Place, mmap.mmap] = {}  # the one that was used longest ago first
        self._held_bytes = 0

    def release(self) -> None:
        """Let the buffers rest: what they hold is there until their room is wanted."""
        super().release()
        self._resting |= self._in_use
        self._in_use.clear()

    def _memory(self, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
        place = offset, nbytes
        if place not in self._in_use:
            self._prefetch(*place)
            if place in self._resting:
                self._in_use[place] = self._resting.pop(place)
            else:
                memory, reading = self._coming.pop(place)
                reading.result()
                self._in_use[place] = memory
        return self._in_use[place], offset % mmap.PAGESIZE

    def _prefetch(self, offset: int, nbytes: int) -> None:
        place = offset, nbytes
        if place in self._coming or place in self._in_use:
            return
        if place in self._resting:  # wanted soon, so not to be given up before the others
            self._resting[place] = self._resting.pop(place)
            return
        start = offset - offset % mmap.PAGESIZE
        memory = self._room(-(-(offset + nbytes - start) // mmap.PAGESIZE) * mmap.PAGESIZE)
        reading = self._reader.submit(self._read, memory, start, offset + nbytes - start)
        self._coming[place] = memory, reading

    def _room(self, size: int) -> mmap.mmap:
        """A buffer of this size: that of something that rests, where there would be too many."""
        while self._resting and self._held_bytes + size > self._capacity_bytes:
            memory = self._resting.pop(next(iter(self._resting)))
            if len(memory) == size:
                return memory
            self._held_bytes -= len(memory)
        self._held_bytes += size
        return private_memory(size)

    def _read(self, memory: mmap.mmap, start: int, nbytes: int) -> None:
        """Fill a buffer's first `nbytes`; runs beside the graphs."""
        got = 0
        with memoryview(memory) as room:
            while got < nbytes:
                try:
                    self._direct.seek(start + got)
                    count = self._direct.readinto(room[got:])
                except OSError as error:
                    raise BundleError(f"{self._path}: cannot be read ({error.strerror or error})") from error
                if not count:
                    raise BundleError(f"{self._path}: has become shorter while it was read: copy it again")
                got += count


def _open_directly(path: Path) -> io.FileIO:
    """The file past the page cache, where the system and its file system can do that."""
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            file = io.FileIO(os.open(path, os.O_RDONLY | os.O_DIRECT))
            try:
                file.readinto(private_memory(mmap.PAGESIZE))
            except OSError:
                file.close()
            else:
                return file
    return path.open("rb", buffering=0)
