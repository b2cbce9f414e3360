"""Writing files and folders so that a crash, a kill or a full disk leaves what was there before.

Everything is written beside its destination, as `.NAME.` and twelve hexadecimal digits, flushed to the disk
and then renamed over it, or exchanged with the folder that was there. Who writes holds a lock on it; what
nobody holds is left of a process that died, and the next one that writes to the same place removes it.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import EdgePeftError, UsageError
from .sizes import format_size
from .system import exchange as _exchange
from .system import lock as _locked

# Windows renames and deletes nothing that is open or mapped: ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION and
# ERROR_USER_MAPPED_FILE.
_WINDOWS_IN_USE = (5, 32, 1224)


def _write_error(path: Path, error: OSError) -> EdgePeftError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({format_size(shutil.disk_usage(path.parent).free)} free)"
        return EdgePeftError(
            f"{path}: the disk is full{free}; nothing was changed: free some space or write somewhere else"
        )
    message = f"{path}: cannot be written ({error.strerror or error}); nothing was changed"
    if getattr(error, "winerror", None) in _WINDOWS_IN_USE:
        message += ": close what has it open, such as a model that is loaded from there"
    return EdgePeftError(message)


def _sync_folder(path: Path) -> None:
    """Make a rename inside `path` survive a power cut; a no-op where folders cannot be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_SIBLING = re.compile(r"\.(.+)\.[0-9a-f]{12}")
_ABANDONED_S = 24 * 3600
"""Age at which what was being written is taken for abandoned, where there are no locks (Windows)."""


def _sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(6)}"


def _release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, once no other process does; nobody is held off where there are no locks (Windows)."""
    descriptor = _locked(folder, wait=True)
    try:
        yield
    finally:
        _release(descriptor)


def _new_sibling(path: Path, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """Make a sibling of `path`, and hold it: its path and its lock, None where there are none.

    Between the two another process may take it for what a process that died has left, and remove it.
    """
    while True:
        temporary = _sibling(path)
        make(temporary)
        lock = _locked(temporary, wait=True)
        if temporary.exists():
            return temporary, lock
        _release(lock)


def _is_old(path: Path) -> bool:
    """Whether nobody can be writing this any more, where there are no locks."""
    if sys.platform != "win32":
        return False
    try:
        return time.time() - path.lstat().st_mtime > _ABANDONED_S
    except OSError:
        return False


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes that died have left half-written in `folder`, of the destination `name` or of
    any; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            found = _SIBLING.fullmatch(path.name)
            if found is None or name not in (None, found[1]) or path.is_symlink():
                continue
            # Held until it is gone: who has just made it waits, and makes another.
            lock = _locked(path, wait=False)
            if lock is not None or _is_old(path):
                _remove(path)
            _release(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def settle(path: Path) -> None:
    """Finish or undo what a process that died was doing to the file or folder at `path`: before it is read
    that once, and before it is written."""
    path = Path(path)
    previous = path.parent / f".{path.name}.previous"
    if previous.is_dir() and not path.is_symlink():
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                previous.rename(path)
    remove_leftovers(path.parent, path.name)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it goes at once, or not at all.

    Raises:
        EdgePeftError: it cannot be removed.
    """
    leaving = _sibling(path)
    try:
        path.rename(leaving)
        shutil.rmtree(leaving)
        _sync_folder(path.parent)
    except OSError as error:
        raise EdgePeftError(f"{path}: cannot be removed ({error.strerror or error})") from error


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:  # Windows flushes what may be written to
        os.fsync(file.fileno())


Check = Callable[[Path], None]
"""Looks at a written file before it takes its place; what it raises keeps the one that was there."""


@contextlib.contextmanager
def atomic_path(path: Path, check: Check | None = None) -> Iterator[Path]:
    """Give a temporary sibling of `path` for a file that takes `path`'s place when the block ends well; for
    libraries that open files themselves.

    Raises:
        EdgePeftError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    temporary, lock = None, None
    try:
        try:
            temporary, lock = _new_sibling(path, lambda new: new.open("xb").close())
            yield temporary
            _sync_file(temporary)
            if check is not None:
                check(temporary)
            _release(lock)
            lock = None
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise _write_error(path, error) from error
    finally:
        _release(lock)
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def atomic_file(path: Path, check: Check | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` whole, or not at all.

    Raises:
        EdgePeftError: see `atomic_path`.
    """
    with atomic_path(path, check) as temporary, temporary.open("wb") as file:
        yield file


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def check_replaceable(path: Path, marker: str) -> None:
    """Refuse an output that cannot be written, which would show after the work only, and to replace anything
    but an empty folder or one that holds the file `marker`.

    Raises:
        UsageError: there is something else at `path`, or nothing can be.
    """
    path = Path(path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "may not be written to" if parent.is_dir() else "is no folder"
        raise UsageError(f"{path}: cannot be written, {parent} {reason}: give another path")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and ((path / marker).is_file() or not any(path.iterdir())):
        return
    raise UsageError(
        f"{path}: exists and holds no {marker}, so it is not replaced: give another path or remove it"
    )


@contextlib.contextmanager
def atomic_folder(path: Path, marker: str) -> Iterator[Path]:
    """Give a temporary sibling of `path` to fill in; it takes `path`'s place when the block ends well.

    A folder that was there is exchanged with it in one step where the system can. Elsewhere it is kept as
    `.NAME.previous` in between, and brought back when the exchange fails, or by `settle` when the process
    died.

    Args:
        path: where the folder shall be.
        marker: the file by which a folder is known to be replaceable (`manifest.json`,
            `adapter_config.json`).

    Raises:
        UsageError: something that is not such a folder stands at `path`.
        EdgePeftError: the folder cannot be written, for example because the disk is full.
    """
    settle(path)
    check_replaceable(path, marker)
    path = Path(path).resolve()  # a link to a folder stays, the folder is replaced
    settle(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path) as temporary:  # holds the old one, once the two are exchanged
            yield temporary
            for inside in [*temporary.rglob("*"), temporary]:
                if inside.is_file():
                    _sync_file(inside)
                else:
                    _sync_folder(inside)
            _take_place(temporary, path)
            _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path`, named after it, that is gone when the block ends; or when the next one
    is made there, should this process die."""
    remove_leftovers(path.parent, path.name)
    temporary, lock = _new_sibling(path, Path.mkdir)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _release(lock)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder among the system's temporary files, for this user alone; see `scratch_folder`."""
    with scratch_folder(Path(tempfile.gettempdir()) / "edgepeft") as folder:
        folder.chmod(0o700)
        yield folder


def _take_place(temporary: Path, path: Path) -> None:
    """Have the folder `temporary` stand at `path`."""
    if path.exists() and _exchange(temporary, path):
        return
    previous = path.parent / f".{path.name}.previous"
    if path.exists():
        path.rename(previous)
    try:
        temporary.rename(path)
    except BaseException:  # Ctrl-C between the two, too
        if previous.exists() and not path.exists():
            previous.rename(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)
