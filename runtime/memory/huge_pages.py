"""Huge pages for memory that is read from end to end for every token.

With pages of 4 KiB, 86 MB of weights are 21,000 addresses to translate a token, more than a processor
remembers, and its prefetching stops at the end of each. `docs/decisions/generation.md` has what huge pages
are worth.
Source: madvise(2), MADV_COLLAPSE (Linux 6.1); mincore(2); `Documentation/admin-guide/mm/transhuge.rst`.
"""

import mmap
from pathlib import Path

import numpy as np

from .mappings import advise_addresses, private_mappings, resident_pages
from .system import read_kernel

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25


def gather_into_huge_pages() -> int:
    """Ask the kernel to move this process's anonymous memory into huge pages.

    Only where all the pages that a huge one replaces are resident, so none becomes resident that was not.
    Contents and addresses stay: other threads may go on using them.

    Returns:
        Bytes that are in huge pages now; 0 where the system has none, or none to give.
    """
    enabled, size = (read_kernel(_SETTINGS / name) for name in ("enabled", "hpage_pmd_size"))
    if enabled is None or "[never]" in enabled or size is None:
        return 0
    huge_bytes, gathered_bytes = int(size), 0
    for mapping in list(private_mappings(_is_anonymous)):
        begin = -(-mapping.begin // huge_bytes) * huge_bytes
        end = mapping.end // huge_bytes * huge_bytes
        if begin >= end or not mapping.writable:
            continue
        resident = resident_pages(begin, end)
        if resident is None:
            continue
        whole = resident.reshape(-1, huge_bytes // mmap.PAGESIZE).all(1)
        # A call a stretch: each waits for all processors once.
        edges = np.flatnonzero(np.diff(whole, prepend=False, append=False)) * huge_bytes
        for first, last in edges.reshape(-1, 2).tolist():
            if advise_addresses(begin + first, begin + last, _MADV_COLLAPSE):
                gathered_bytes += last - first
    return gathered_bytes


def _is_anonymous(path: str) -> bool:
    """Whether a mapping is malloc's heap, or memory without a file, which Android gives a name."""
    return not path or path.startswith(("[heap]", "[anon:"))
