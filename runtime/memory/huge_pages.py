"""Huge pages for memory that is read from end to end for every token.

With pages of 4 KiB, 86 MB of weights are 21,000 addresses to translate a token, more than a processor
remembers, and its prefetching stops at the end of each. `docs/decisions.md` has what huge pages are worth.
Source: madvise(2), MADV_COLLAPSE (Linux 6.1); mincore(2); `Documentation/admin-guide/mm/transhuge.rst`.
"""

import ctypes
import mmap
from pathlib import Path

import numpy as np

from edgepeft.runtime.memory.mappings import advise_addresses, private_mappings

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
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
        mappings = [item for item in private_mappings(_is_anonymous) if item.writable]
    except OSError:
        return 0
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    gathered_bytes = 0
    for mapping in mappings:
        begin = -(-mapping.begin // huge_bytes) * huge_bytes
        end = mapping.end // huge_bytes * huge_bytes
        if begin >= end:
            continue
        resident = np.zeros((end - begin) // mmap.PAGESIZE, np.uint8)
        if mincore(begin, end - begin, resident.ctypes.data) != 0:
            continue
        whole = (resident & 1).reshape(-1, huge_bytes // mmap.PAGESIZE).all(1)
        # A call a stretch: each waits for all processors once.
        edges = np.flatnonzero(np.diff(whole, prepend=False, append=False)) * huge_bytes
        for first, last in edges.reshape(-1, 2).tolist():
            if advise_addresses(begin + first, begin + last, _MADV_COLLAPSE):
                gathered_bytes += last - first
    return gathered_bytes


def _is_anonymous(path: str) -> bool:
    """Whether a mapping is malloc's heap, or memory without a file, which Android gives a name."""
    return not path or path.startswith(("[heap]", "[anon:"))
