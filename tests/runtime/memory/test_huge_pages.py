"""Memory in huge pages, by the kernel's own accounting."""

import ctypes
import mmap
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from edgepeft.runtime.memory import huge_pages
from edgepeft.runtime.memory.huge_pages import gather_into_huge_pages

_HUGE_BYTES = 2**21
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _supported() -> bool:
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return platform.system() == "Linux" and version >= (6, 1) and _SETTING.exists()


pytestmark = pytest.mark.skipif(
    not _supported() or "[never]" in _SETTING.read_text("ascii"),
    reason="MADV_COLLAPSE needs Linux 6.1 and huge pages",
)


def _mapping(size_bytes: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _kilobytes(address: int, field: str) -> int:
    """A field of the mapping that holds an address, which may be joined with others'."""
    for block in re.split(
        r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text("utf-8"), flags=re.MULTILINE
    )[1:]:
        first, last = (int(part, 16) for part in block.split()[0].split("-"))
        if first <= address < last:
            return int(re.search(rf"^{field}: +(\d+) kB", block, re.MULTILINE)[1])  # type: ignore[index]
    raise AssertionError(f"no mapping holds {address:#x}")


def test_resident_memory_comes_into_huge_pages_and_keeps_its_contents() -> None:
    """16 MiB without gaps are in huge pages afterwards, but for what is beyond their limits."""
    memory, address = _mapping(8 * _HUGE_BYTES)
    values = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8).tobytes()
    memory[:] = values
    before = _kilobytes(address, "AnonHugePages")
    assert gather_into_huge_pages() >= 7 * _HUGE_BYTES
    assert _kilobytes(address, "AnonHugePages") - before >= 7 * _HUGE_BYTES // 1024
    assert memory[:] == values


def test_memory_with_gaps_stays_as_it_is() -> None:
    """Where every second page was never written to, nothing becomes resident."""
    memory, address = _mapping(8 * _HUGE_BYTES)
    for offset in range(0, len(memory), 2 * mmap.PAGESIZE):
        memory[offset] = 1
    before = _kilobytes(address, "Rss")
    gather_into_huge_pages()
    assert _kilobytes(address, "Rss") - before < len(memory) // 8 // 1024


def test_nothing_is_done_where_the_system_forbids_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`never` is an administrator's wish, which MADV_COLLAPSE by itself ignores."""
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    assert gather_into_huge_pages() == 0


def test_nothing_is_done_on_a_system_without_huge_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path / "missing")
    assert gather_into_huge_pages() == 0
