"""Takes what only Linux has from every Python process on whose path this folder is: Python imports it first.

    PYTHONPATH=tests/other_systems SIMULATED_SYSTEM=windows python -m pytest tests/runtime/training

`SIMULATED_SYSTEM` is one of

- `windows`: there are no `resource` and no `fcntl`, no `madvise` and no C library by the name None, no folder
  can be opened, and nothing is renamed, replaced or deleted that this process has open or mapped, nor a
  folder around it;
- `macos`: advice on memory is a hint, after which every page is where it was;
- `bare`: a Linux whose sandbox hides /proc and /sys and whose kernel takes no advice, without psutil (which
  needs /proc itself).

None of them has /proc and /sys. psutil alone reads them here, which it does not have to on the real ones.
"""

import contextlib
import ctypes  # noqa: F401  (it opens the C library by the name None itself)
import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SYSTEM = os.environ["SIMULATED_SYSTEM"]
MISSING = {"windows": ("resource", "readline", "fcntl"), "macos": (), "bare": ("psutil",)}
HIDDEN = ("/proc/", "/sys/")
LACKING = ("O_DIRECT", "posix_fallocate", "sync")
LACKING_ON_WINDOWS = ("O_TMPFILE", "sched_getaffinity")
_thread = threading.local()


class AdvisedMap(mmap.mmap):
    """A map that takes no advice, or takes it for a hint."""

    def madvise(self, *_: Any) -> None:
        """See madvise(2)."""
        if SYSTEM != "macos":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (`sys.addaudithook`): raises what the simulated system would."""
    if getattr(_thread, "is_looking", False):
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if path.startswith(HIDDEN) and not _asked_by_psutil():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        # Only `os.open` tells no mode: tempfile names a folder too, and opens a file.
        if SYSTEM == "windows" and arguments[1] is None and Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    if SYSTEM != "windows":
        return
    if event == "ctypes.dlopen" and arguments[0] is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    if event in ("os.rename", "os.remove", "os.rmdir"):
        for name in arguments[: 2 if event == "os.rename" else 1]:
            if _is_in_use(Path(os.fsdecode(name))):
                raise PermissionError(errno.EACCES, "Access is denied", os.fsdecode(name))


def _asked_by_psutil() -> bool:
    frame = sys._getframe()
    while frame and not frame.f_globals.get("__name__", "").startswith("psutil"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _memory_info(process: Any) -> SimpleNamespace:
    """What psutil tells of this process on Windows."""
    del process
    with _looking():
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return SimpleNamespace(rss=sizes["VmRSS:"], peak_wset=sizes["VmHWM:"])


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    """Linux's files are there meanwhile, for this thread."""
    _thread.is_looking = True
    try:
        yield
    finally:
        _thread.is_looking = False


def _is_in_use(path: Path) -> bool:
    """Whether this process has a file open or mapped that is `path` or below it."""
    with _looking():
        held = {
            line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines()
        }
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                held.add(str(descriptor.readlink()))
        place = path.parent.resolve() / path.name
        return any(Path(name).is_relative_to(place) for name in held if name.startswith("/"))


def _take_away() -> None:
    mmap.mmap = AdvisedMap  # type: ignore[misc]
    for name in LACKING + LACKING_ON_WINDOWS * (SYSTEM == "windows"):
        delattr(os, name)
    if SYSTEM == "windows":
        # torch, which some tests compare with, asks for the other names.
        for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_ANON"))]:
            delattr(mmap, name)
        os.supports_dir_fd.discard(os.open)  # by which shutil.rmtree, imported with tempfile, opens folders
        import tempfile

        tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc,assignment]
        import psutil  # on Linux it needs `resource` itself

        psutil.Process.memory_info = _memory_info  # type: ignore[method-assign]
    for name in MISSING[SYSTEM]:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.addaudithook(refuse)


_take_away()
