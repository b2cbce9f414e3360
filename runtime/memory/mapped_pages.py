"""Pages of a mapped file that a session has read and will hardly read again.

onnxruntime packs weights anew when a session is opened. It lets go of the maps of most that it has packed,
but keeps those of the scales that go with them: 45 MiB of Qwen2.5-0.5B with rounded activations.
Source: madvise(2); `Documentation/admin-guide/mm/pagemap.rst`.
"""

import mmap
from pathlib import Path

import numpy as np

from .mappings import advise_addresses, page_entries, private_mappings

_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def drop_mapped_pages(file: Path) -> None:
    """Take a file's pages out of this process where they are as the file has them: one that is read later
    comes from the system's cache, or from the disk. Nothing happens but on Linux."""
    for mapping in private_mappings(str(file).__eq__):
        if _is_the_file(mapping.begin, mapping.end):
            advise_addresses(mapping.begin, mapping.end, mmap.MADV_DONTNEED)


def _is_the_file(begin: int, end: int) -> bool:
    """Whether no page between two addresses was written to: such a page is no longer the file's."""
    entries = page_entries(begin, end)
    if entries is None:
        return False
    held = entries & (_PRESENT | _SWAPPED) != 0
    return not np.any(held & (entries & _OF_FILE == 0))
