"""Pages of a mapped file leave the process, by the kernel's own accounting."""

import mmap
import platform
from pathlib import Path

import pytest

from edgepeft.runtime.memory.mapped_pages import drop_mapped_pages
from edgepeft.runtime.memory.process import read_memory

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/maps")

_SIZE_BYTES = 16 * 2**20


def _mapped(file: Path) -> mmap.mmap:
    """The file as onnxruntime maps it: private and writable."""
    with file.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)


def _file(folder: Path) -> Path:
    file = folder / "weights of mine.bin"
    file.write_bytes(bytes(range(256)) * (_SIZE_BYTES // 256))
    return file


def _resident_file_bytes() -> int:
    held = read_memory().file_bytes
    assert held is not None
    return held


def test_pages_that_were_read_leave_and_come_back(tmp_path: Path) -> None:
    """16 MiB that were read leave the process, and have the file's contents when they are read again."""
    file = _file(tmp_path)
    memory = _mapped(file)
    contents = memory[:]
    before_bytes = _resident_file_bytes()
    drop_mapped_pages(file)
    assert before_bytes - _resident_file_bytes() > 0.9 * _SIZE_BYTES
    assert memory[:] == contents


def test_pages_that_were_written_stay(tmp_path: Path) -> None:
    """A private map with a page of its own is left alone: dropping it would lose what was written."""
    file = _file(tmp_path)
    memory = _mapped(file)
    memory[5000] = 77
    drop_mapped_pages(file)
    assert memory[5000] == 77


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    file, other = _file(tmp_path), _file(tmp_path / "other")
    memory = _mapped(other)
    assert memory[:256] == bytes(range(256))
    sum(memory[:: mmap.PAGESIZE])
    before_bytes = _resident_file_bytes()
    drop_mapped_pages(file)
    assert before_bytes - _resident_file_bytes() < 0.1 * _SIZE_BYTES
