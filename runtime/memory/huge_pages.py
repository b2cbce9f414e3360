"""Huge pages for memory that is read from end to end for every token.

With pages of 4 KiB, 86 MB of weights are 21,000 addresses to translate a token, more than a processor
remembers, and its prefetching stops at the end of each. `docs/decisions.md` has what huge pages are worth.
Source: madvise(2), MADV_COLLAPSE (Linux 6.1); mincore(2); `Documentation/admin-guide/mm/transhuge.rst`.
"""

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MAPPINGS = Path("/proc/self/maps")
_MADV_COLLAPSE = 25


def gather_into_huge_pages() -> int:
    """Ask the kernel to move this process's anonymous memory into huge pages.

    Only where all the pages that a huge one replaces are resident, so none becomes resident that was not.
    Contents and addresses stay: other threads may go on using them.

    Returns:
        Bytes that are in huge pages now; 0 where the system has none, or none to give.
    """
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        huge_bytes = int((_SETTINGS / "hpage_pmd_size").read_text())
        mappings = _MAPPINGS.read_text().splitlines()
        libc = ctypes.CDLL(None)
        madvise, mincore = libc.madvise, libc.mincore
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    gathered_bytes = 0
    for begin, end in _anonymous(mappings):
        begin, end = -(-begin // huge_bytes) * huge_bytes, end // huge_bytes * huge_bytes
        if begin >= end:
            continue
        resident = np.zeros((end - begin) // mmap.PAGESIZE, np.uint8)
        if mincore(begin, end - begin, resident.ctypes.data) != 0:
            continue
        whole = (resident & 1).reshape(-1, huge_bytes // mmap.PAGESIZE).all(1)
        # A call a stretch: each waits for all processors once.
        edges = np.flatnonzero(np.diff(whole, prepend=False, append=False)) * huge_bytes
        for first, last in edges.reshape(-1, 2).tolist():
            if madvise(begin + first, last - first, _MADV_COLLAPSE) == 0:
                gathered_bytes += last - first
    return gathered_bytes


def _anonymous(mappings: list[str]) -> Iterator[tuple[int, int]]:
    """First and last address of malloc's heap and of private memory without a file."""
    for line in mappings:
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and (not name or name[0].startswith(("[heap]", "[anon:"))):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            yield begin, end
