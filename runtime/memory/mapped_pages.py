"""Pages of a mapped file that a session has read and will hardly read again.

onnxruntime packs weights anew when a session is opened. It lets go of the maps of most that it has packed,
but keeps those of the scales that go with them: 45 MiB of Qwen2.5-0.5B with rounded activations.
"""

import ctypes
import mmap
import re
from pathlib import Path

_MAPPINGS = Path("/proc/self/smaps")
_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) \S+p \S+ \S+ \d+ +(.+)\n(?:[A-Z].*\n)*?Anonymous: +(\d+) kB$", re.MULTILINE
)


def drop_mapped_pages(file: Path) -> None:
    """Take a file's pages out of this process where they are as the file has them: one that is read later
    comes from the system's cache, or from the disk. Nothing happens but on Linux."""
    try:
        mappings = _MAPPING.findall(_MAPPINGS.read_text())
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end, path, changed_kib in mappings:
        if path == str(file) and changed_kib == "0":
            madvise(int(begin, 16), int(end, 16) - int(begin, 16), mmap.MADV_DONTNEED)
