"""What a system has not got is done without."""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

import edgepeft
from edgepeft.errors import BudgetError
from edgepeft.runtime.memory import process, system
from edgepeft.runtime.memory.huge_pages import gather_into_huge_pages
from edgepeft.runtime.memory.mapped_pages import drop_mapped_pages

from .. import tiny
from .test_memory import falls, held, without_proc

__all__ = ["without_proc"]  # the fixture
MIB = 2**20


def test_files_of_the_kernel_may_be_missing(tmp_path: Path) -> None:
    """Or forbidden; paths that they name need not be text."""
    assert system.read_kernel(tmp_path / "none") is None
    assert system.read_kernel_bytes(tmp_path / "none", 0, 8) is None
    assert not system.write_kernel(tmp_path / "none" / "file", "5")
    (tmp_path / "maps").write_bytes(b"00-10 /home/\xff.so")
    assert system.read_kernel(tmp_path / "maps") == "00-10 " + os.fsdecode(b"/home/\xff.so")
    assert system.read_kernel_bytes(tmp_path / "maps", 3, 2) == b"10"


def test_windows_has_no_c_library_by_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CDLL(None)` is a TypeError there, which once ended every update."""

    def none(name: None) -> None:
        raise TypeError(f"argument of type {type(name).__name__!r} is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", none)
    system.c_function.cache_clear()
    assert system.c_function("malloc_trim", ctypes.c_size_t) is None
    process.release_freed_memory()
    gather_into_huge_pages()
    drop_mapped_pages(Path(__file__))
    system.c_function.cache_clear()


def test_a_function_that_the_c_library_lacks() -> None:
    """`malloc_trim` is glibc's."""
    assert system.c_function("edgepeft_has_no_such_function") is None


class Refusing(mmap.mmap):
    """A map on a kernel that was built without advice, or without the one that is given."""

    def madvise(self, *_: Any) -> None:
        """See madvise(2)."""
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_a_kernel_without_huge_pages_refuses_advice_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MADV_NOHUGEPAGE` is an error there, and memory is memory all the same."""
    monkeypatch.setattr(mmap, "mmap", Refusing)
    memory = system.private_memory(3 * mmap.PAGESIZE)
    memory[-1] = 7
    assert (memory[0], memory[-1]) == (0, 7)
    assert not system.advise(memory, "MADV_RANDOM")
    assert not system.advise(memory, "MADV_OF_ANOTHER_SYSTEM")


def test_whether_pages_are_given_back_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes the advice for a hint is told from one that follows it."""

    class Hinted(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            """See madvise(2)."""

    for kind, follows in ((Hinted, False), (Refusing, False)):
        monkeypatch.setattr(mmap, "mmap", kind)
        system._discards.cache_clear()
        memory = system.private_memory(mmap.PAGESIZE)
        memory[0] = 1
        assert (system.discard(memory), memory[0]) == (follows, 1)
    system._discards.cache_clear()


@falls
@pytest.mark.usefixtures("without_proc")
def test_a_budget_is_of_what_is_held_now(classifier: Path) -> None:
    """Memory that the process once had does not count: a budget that is too small beside it does later."""
    budget_bytes = process.read_memory().resident_bytes + 96 * MIB
    batch = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]}
    with edgepeft.load(classifier, memory_budget=budget_bytes) as model:
        with held(128 * MIB), pytest.raises(BudgetError):
            model.forward(batch)
        model.forward(batch)
    with edgepeft.load(classifier, memory_budget=budget_bytes) as model:
        assert process.read_memory().peak_bytes > budget_bytes
        report = model.adapt(tiny.records(), classifier.parent / "adapted", steps=12, learning_rate=0.05)
    assert not report.memory.peak_is_exact
    assert report.memory.measured_peak_bytes < budget_bytes
