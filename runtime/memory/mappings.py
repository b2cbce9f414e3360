"""This process's memory mappings, and advice to the kernel on them by address, on Linux.

Source: proc_pid_maps(5), madvise(2).
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_MAPPINGS = Path("/proc/self/maps")


class Mapping(NamedTuple):
    """First and last address, and whether it may be written to."""

    begin: int
    end: int
    writable: bool


def private_mappings(is_wanted: Callable[[str], bool]) -> Iterator[Mapping]:
    """Those whose changes no other process sees.

    Args:
        is_wanted: given the path of a mapping's file; what has no file has no path, or a name in brackets.

    Raises:
        OSError: the system does not say.
    """
    for line in _MAPPINGS.read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions[3] == "p" and is_wanted("".join(path)):
            begin, end = addresses.split("-")
            yield Mapping(int(begin, 16), int(end, 16), permissions.startswith("rw-"))


def advise_addresses(begin: int, end: int, advice: int) -> bool:
    """madvise(2) on whole pages; whether the kernel followed it."""
    return bool(_madvise()(begin, end - begin, advice) == 0)


@functools.cache
def _madvise() -> Any:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
