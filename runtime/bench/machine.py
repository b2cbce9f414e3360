"""The machine that a figure was measured on, in a line that names neither it nor its user."""

import os
import platform
import re
from pathlib import Path

from ..memory.system import read_kernel

_CPU_INFO = Path("/proc/cpuinfo")
_BOARD = Path("/proc/device-tree/model")
_MOST_CHARACTERS = 60


def machine_name() -> str:
    """Processor (or board), cores and system: `AMD EPYC 7763 64-Core Processor, 2 cores, Linux x86_64`."""
    return f"{_cpu()}, {_cores()} cores, {platform.system()} {platform.machine()}"


def shortened(text: str, most: int = _MOST_CHARACTERS) -> str:
    """A name for a title: on one line, and cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    """What the kernel calls the processor; on ARM boards, where it does not say, the board."""
    for path, pattern in ((_CPU_INFO, r"model name\s*:\s*(.+)"), (_BOARD, r"([^\0]+)")):
        found = re.search(pattern, read_kernel(path) or "")
        if found is not None and found[1].strip():
            return shortened(found[1])
    return shortened(platform.processor() or platform.machine())
