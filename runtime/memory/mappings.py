"""This process's memory mappings, their pages, and advice to the kernel on them by address: on Linux.

Source: proc_pid_maps(5), proc_pid_pagemap(5), mincore(2), madvise(2).
"""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .system import c_function, read_kernel, read_kernel_bytes

_MAPPINGS, _PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")


class Mapping(NamedTuple):
    """First and last address, and whether it may be written to."""

    begin: int
    end: int
    writable: bool


def private_mappings(is_wanted: Callable[[str], bool]) -> Iterator[Mapping]:
    """Those whose changes no other process sees; none where the system does not say.

    Args:
        is_wanted: given the path of a mapping's file; what has no file has no path, or a name in brackets.
    """
    for line in (read_kernel(_MAPPINGS) or "").splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions[3] == "p" and is_wanted("".join(path)):
            begin, end = addresses.split("-")
            yield Mapping(int(begin, 16), int(end, 16), permissions.startswith("rw-"))


def page_entries(begin: int, end: int) -> npt.NDArray[np.uint64] | None:
    """The kernel's entry for each page between two addresses; None where it shows none."""
    count = (end - begin) // mmap.PAGESIZE
    data = read_kernel_bytes(_PAGES, begin // mmap.PAGESIZE * 8, count * 8)
    return np.frombuffer(data, np.uint64) if data is not None and len(data) == count * 8 else None


def resident_pages(begin: int, end: int) -> npt.NDArray[np.bool_] | None:
    """Whether each page between two addresses is in memory; None where the system does not say."""
    mincore = c_function("mincore", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    pages = np.zeros((end - begin) // mmap.PAGESIZE, np.uint8)
    if mincore is None or mincore(begin, end - begin, pages.ctypes.data) != 0:
        return None
    is_resident: npt.NDArray[np.bool_] = pages & 1 != 0
    return is_resident


def advise_addresses(begin: int, end: int, advice: int) -> bool:
    """madvise(2) on whole pages; whether the kernel followed it."""
    madvise = c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise is not None and madvise(begin, end - begin, advice) == 0
