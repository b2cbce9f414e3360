"""What only some systems tell a process, or do for it: asked for here and nowhere else.

Linux has all of it: files below /proc and /sys, advice on memory, functions of its C library. Other systems
have a part, and a container or an app's sandbox may hide some of Linux's too. So everything here answers
None or False where there is nothing, and who asks does without; `docs/systems.md` says what is lost then.

Source: proc_pid_status(5), madvise(2), getrusage(2), psutil's documentation of `Process.memory_info`.
"""

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def read_kernel(path: Path) -> str | None:
    """A file of the kernel's below /proc or /sys; paths that it names may be any bytes, as Python's are."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None


def read_kernel_bytes(path: Path, offset: int, nbytes: int) -> bytes | None:
    """A part of such a file; it may be shorter than was asked for."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(nbytes)
    except OSError:
        return None


def write_kernel(path: Path, text: str) -> bool:
    """Ask something of the kernel through such a file; False where it does not permit that."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        return False
    return True


def memory_from_status() -> dict[str, int] | None:
    """Linux's account of this process, in bytes by the kernel's names (`VmRSS`, `VmHWM`, `RssAnon`, …)."""
    lines = (line.split() for line in (read_kernel(_STATUS) or "").splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}
    return sizes if "VmRSS" in sizes else None


def memory_from_psutil() -> tuple[int, int | None] | None:
    """What this process holds now and, where the system says so (Windows), held at most, in bytes."""
    try:
        import psutil
    except ImportError:
        return None
    try:
        memory = psutil.Process().memory_info()
    except (psutil.Error, OSError):  # a Linux without /proc
        return None
    return memory.rss, getattr(memory, "peak_wset", None)


def peak_from_getrusage() -> int | None:
    """The most that this process ever held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes everywhere but on Apple's systems


@functools.cache
def c_function(name: str, *argument_types: Any) -> Callable[..., int] | None:
    """A function of this process's C library that returns a whole number."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):  # Windows: there is no library by the name None
        return None
    function.argtypes = argument_types
    return function  # type: ignore[no-any-return]


def advise(memory: mmap.mmap, advice: str, *where: int) -> bool:
    """Advice on a part or all of a map, by its name in `mmap`; whether the system knows and takes it."""
    option = getattr(mmap, advice, None)
    if option is None:
        return False
    try:
        memory.madvise(option, *where)
    except OSError:  # a kernel that was built without it
        return False
    return True


def discard(memory: mmap.mmap) -> bool:
    """Give the pages of a map back: zeros, or the file's contents, are read in their place.

    Returns:
        False where the system does not do that while the map is there, so that only closing it does.
    """
    return _discards() and advise(memory, "MADV_DONTNEED")


@functools.cache
def _discards() -> bool:
    """Whether `MADV_DONTNEED` does so: on macOS, and under some emulators, it is a hint and pages stay."""
    memory = private_memory(mmap.PAGESIZE)
    memory[0] = 1
    return advise(memory, "MADV_DONTNEED") and memory[0] == 0


def private_memory(nbytes: int) -> mmap.mmap:
    """Zeros on page boundaries that cost memory where they are written; shared ones would stay after
    `MADV_DONTNEED`."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advise(memory, "MADV_NOHUGEPAGE")
    return memory


@contextlib.contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Let this process have that much more address space; nothing where the system limits none."""
    held_bytes = (memory_from_status() or {}).get("VmSize")
    if held_bytes is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held_bytes + more_bytes
    for present in (soft, hard):
        limit = limit if present == resource.RLIM_INFINITY else min(limit, present)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
