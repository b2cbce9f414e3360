"""Writing files and folders so that a crash, a kill or a full disk leaves what was there before.

Everything is written beside its destination, flushed to the disk and then renamed over it.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.sizes import format_size

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


def _sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(6)}"


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
    temporary = _sibling(path)
    try:
        try:
            yield temporary
            _sync_file(temporary)
            if check is not None:
                check(temporary)
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise _write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_file(path: Path, check: Check | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` whole, or not at all.

    Raises:
        EdgePeftError: see `atomic_path`.
    """
    with atomic_path(path, check) as temporary, temporary.open("xb") as file:
        yield file


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def check_replaceable(path: Path, marker: str) -> None:
    """Refuse to replace anything but an empty folder or one that holds the file `marker`.

    Raises:
        UsageError: there is something else at `path`.
    """
    path = Path(path)
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

    A folder that was there is kept as `.NAME.previous` while the two are exchanged, and brought back when the
    exchange fails, or by the next call when the process died in between.

    Args:
        path: where the folder shall be.
        marker: the file by which a folder is known to be replaceable (`manifest.json`,
            `adapter_config.json`).

    Raises:
        UsageError: something that is not such a folder stands at `path`.
        EdgePeftError: the folder cannot be written, for example because the disk is full.
    """
    if not Path(path).is_symlink():
        previous = Path(path).parent / f".{Path(path).name}.previous"
        if previous.is_dir() and not Path(path).exists():
            previous.rename(path)
    check_replaceable(path, marker)
    path = Path(path).resolve()  # a link to a folder stays, the folder is replaced
    previous = path.parent / f".{path.name}.previous"
    temporary: Path | None = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _sibling(path)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            if previous.exists():
                shutil.rmtree(previous)
            if path.exists():
                path.rename(previous)
            try:
                temporary.rename(path)
            except BaseException:  # Ctrl-C between the two, too
                if previous.exists() and not path.exists():
                    previous.rename(path)
                raise
            _sync_folder(path.parent)
        except OSError as error:
            raise _write_error(path, error) from error
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
