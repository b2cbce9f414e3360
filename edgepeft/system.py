"""What only some systems do for files, asked for here; where there is nothing, who asks does without."""

import os
import sys
from pathlib import Path


def lock(path: Path, *, wait: bool) -> int | None:
    """Open a file or folder that no other process holds, or wait for it; the descriptor holds it until it is
    closed, or until the process dies.

    Returns:
        None where somebody else holds it, or where there are no such locks: on Windows, on some file systems.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system, or the file system, cannot.

    Source: rename(2), RENAME_EXCHANGE.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    here, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):  # an old C library, or none by the name None
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
