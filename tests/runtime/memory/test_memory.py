"""What the process is said to hold, and what a run is predicted to need."""

import contextlib
import dataclasses
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import numpy as np
import pytest

from edgepeft.bundle.manifest import Manifest, Strategy
from edgepeft.bundle.memory_formula import MemoryFormula, MemoryTerm
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import BudgetError, EdgePeftError, UsageError
from edgepeft.runtime.memory import process, system
from edgepeft.runtime.memory.planner import Plan, Workload, check_run, choose, plans

MIB = 2**20
linux = pytest.mark.skipif(system.memory_from_status() is None, reason="needs /proc")
falls = pytest.mark.skipif(
    system.memory_from_status() is None and system.memory_from_psutil() is None,
    reason="the system tells a peak alone",
)


def test_resident_memory_is_the_systems() -> None:
    """As psutil reads it, within what a test itself allocates."""
    psutil = pytest.importorskip("psutil")
    assert abs(process.read_memory().resident_bytes - psutil.Process().memory_info().rss) < 4 * MIB


@linux
def test_anonymous_memory_is_told_from_mapped_files(tmp_path: Path) -> None:
    """16 MiB of each."""
    before = process.read_memory()
    block = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # malloc may have had it
    block[:] = bytes(len(block))
    anonymous = process.read_memory()
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        both = process.read_memory()
    assert anonymous.anonymous_bytes is not None
    assert before.anonymous_bytes is not None
    assert both.file_bytes is not None
    assert anonymous.file_bytes is not None
    assert anonymous.anonymous_bytes - before.anonymous_bytes == pytest.approx(16 * MIB, rel=0.1)
    assert both.file_bytes - anonymous.file_bytes == pytest.approx(16 * MIB, rel=0.1)
    block.close()


@linux
def test_a_recorder_sees_a_peak_that_is_gone() -> None:
    """32 MiB for a tenth of a second; earlier peaks do not count where the kernel lets them be forgotten."""
    earlier = np.ones(96 * MIB, np.uint8)
    del earlier
    process.release_freed_memory()  # or malloc has 32 MiB left from tests before
    with process.MemoryRecorder(interval_s=0.005) as recorder:
        before = process.read_memory().resident_bytes
        with mmap.mmap(-1, 32 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:  # malloc may keep it
            for place in range(0, len(block), mmap.PAGESIZE):
                block[place] = 1
            time.sleep(0.1)
        time.sleep(0.05)
    assert recorder.peak_bytes - before == pytest.approx(32 * MIB, rel=0.15)
    times, sizes, anonymous, files = zip(*recorder.samples, strict=True)
    assert list(times) == sorted(times)
    assert max(sizes) - before == pytest.approx(32 * MIB, rel=0.15)
    assert max(anonymous) - anonymous[-1] == pytest.approx(32 * MIB, rel=0.15)
    assert max(files) - min(files) < 8 * MIB
    assert sizes[-1] - before < 8 * MIB


def test_a_timeline_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are thinned out and the interval grows."""
    monkeypatch.setattr(process, "_MAX_SAMPLES", 8)
    with process.MemoryRecorder(interval_s=0.0005) as recorder:
        time.sleep(0.2)
    assert 2 < len(recorder.samples) <= 10
    assert recorder.samples[0][0] < 0.1 < recorder.samples[-1][0]


@contextlib.contextmanager
def held(size_bytes: int) -> Iterator[None]:
    """So much memory more, and then no longer."""
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE) as block:
        block[:: mmap.PAGESIZE] = bytes(range(256)) * (size_bytes // mmap.PAGESIZE // 256)
        yield


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on another system than Linux, and where a sandbox hides /proc."""
    monkeypatch.setattr(system, "_STATUS", tmp_path / "none" / "status")
    monkeypatch.setattr(process, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")


@falls
@pytest.mark.usefixtures("without_proc")
def test_without_proc_what_is_held_now_grows_and_shrinks() -> None:
    """By psutil's account, while the peak stays; so a budget is not used up by what is gone."""
    assert not process.reset_peak()
    before = process.read_memory()
    with held(64 * MIB):
        within = process.read_memory()
    after = process.read_memory()
    assert within.resident_bytes - before.resident_bytes == pytest.approx(64 * MIB, rel=0.1)
    assert after.resident_bytes - before.resident_bytes < 8 * MIB
    assert after.peak_bytes >= within.resident_bytes - MIB  # the kernel counts a peak some pages late
    assert (after.anonymous_bytes, after.file_bytes) == (None, None)


@falls
@pytest.mark.usefixtures("without_proc")
def test_an_earlier_peak_is_not_taken_for_a_later_one() -> None:
    """The kernel's peak counts once it exceeds its past, exactly; until then the largest sample does."""
    with held(192 * MIB):
        pass
    past_bytes = process.read_memory().peak_bytes
    with process.MemoryRecorder(interval_s=0.002) as recorder:
        before = process.read_memory().resident_bytes
        with held(64 * MIB):
            time.sleep(0.05)
        assert recorder.recent_peak_bytes - before == pytest.approx(64 * MIB, rel=0.15)
        assert not recorder.peak_is_exact
        recorder.forget_peak()
        assert recorder.recent_peak_bytes - before < 16 * MIB
        assert recorder.peak_bytes - before == pytest.approx(64 * MIB, rel=0.15)
        with held(320 * MIB):
            pass
        assert recorder.peak_is_exact
    assert recorder.peak_bytes == pytest.approx(process.read_memory().peak_bytes, abs=MIB)
    assert recorder.peak_bytes > past_bytes


@pytest.mark.usefixtures("without_proc")
def test_windows_tells_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's names; nothing else is asked."""
    told = SimpleNamespace(rss=40 * MIB, peak_wset=90 * MIB)
    psutil = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: told), Error=KeyError)
    monkeypatch.setitem(sys.modules, "psutil", cast(ModuleType, psutil))
    monkeypatch.setitem(sys.modules, "resource", cast(ModuleType, None))
    assert process.read_memory() == process.ProcessMemory(40 * MIB, 90 * MIB)


@pytest.mark.usefixtures("without_proc")
@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_getrusage_alone_stands_for_both(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    """In bytes on macOS, in kibibytes elsewhere. psutil is missing, or finds nothing."""
    usage = SimpleNamespace(ru_maxrss=50_000)
    resource = SimpleNamespace(getrusage=lambda _: usage, RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", cast(ModuleType, resource))
    monkeypatch.setattr(sys, "platform", platform)

    def no_process() -> None:
        raise KeyError("process PID not found")

    for psutil in (None, SimpleNamespace(Process=no_process, Error=KeyError)):
        monkeypatch.setitem(sys.modules, "psutil", cast(ModuleType, psutil))
        assert process.read_memory() == process.ProcessMemory(50_000 * unit, 50_000 * unit)


@pytest.mark.usefixtures("without_proc")
def test_a_system_that_tells_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what would tell."""
    for name in ("psutil", "resource"):
        monkeypatch.setitem(sys.modules, name, cast(ModuleType, None))
    with pytest.raises(EdgePeftError, match="pip install psutil"):
        process.read_memory()


@linux
def test_a_kernel_that_keeps_no_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gVisor's status has no VmHWM."""
    monkeypatch.setattr(system, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tpython (x kB)\nVmSize:\t 900 kB\nVmRSS:\t 100 kB\n", "utf-8")
    assert process.read_memory() == process.ProcessMemory(100 * 1024, None)


WORKLOAD = Workload(rows=4, seq_len=10, rank=2, adapter_values=1000, trained_values=600)


@pytest.fixture
def manifest(classifier: Path) -> Manifest:
    """A manifest with two strategies, the second slower and smaller."""
    large = MemoryFormula(
        30 * MIB, ((MemoryTerm(MIB, 1),), (MemoryTerm(1000.0, 1, 2), MemoryTerm(500.0, 0, 0, 1)))
    )
    small = MemoryFormula(10 * MIB, ((MemoryTerm(MIB / 4, 1),),))
    return dataclasses.replace(
        open_bundle(classifier).manifest,
        strategies=(Strategy("resident", "train", True, large), Strategy("streamed", "train", True, small)),
        inference_memory=MemoryFormula(12 * MIB, ((MemoryTerm(100.0, 1, 1),),)),
    )


def test_formulas_are_maxima_of_sums() -> None:
    """Powers of batch, sequence and rank."""
    formula = MemoryFormula(7, ((MemoryTerm(2.0, 1, 2, 1), MemoryTerm(0.5)), (MemoryTerm(100.0),)))
    assert formula.activation_bytes(1, 1, 1) == 100
    assert formula.activation_bytes(3, 4, 5) == 2 * 3 * 16 * 5 + 0
    assert dataclasses.replace(formula, arena_gaps=0.25).arena_bytes(3, 4, 5) == 600
    assert MemoryFormula(7, ()).arena_bytes(9, 9, 9) == 0


def test_a_plan_adds_up(manifest: Manifest) -> None:
    """Process, session, activations and state; the evaluation counts where it is larger."""
    resident, streamed = plans(manifest, WORKLOAD, process_bytes=50 * MIB)
    assert 4 * MIB < resident.activation_bytes < 10 * MIB  # the tensors, and what a first run adds
    assert resident.activation_bytes - streamed.activation_bytes == pytest.approx(3 * MIB, abs=2)
    held_bytes = 50 * MIB - 4 * 1000  # without the adapter as it was read
    assert resident.peak_bytes == held_bytes + 30 * MIB + resident.activation_bytes + resident.state_bytes
    assert resident.state_bytes > 5 * 4 * 600 + 2 * 4 * 400
    assert streamed.training_bytes == held_bytes + 10 * MIB + streamed.activation_bytes + streamed.state_bytes
    assert streamed.evaluation_bytes > 12 * MIB
    eager = dataclasses.replace(streamed, session_bytes=0)
    assert eager.peak_bytes == held_bytes + eager.state_bytes + eager.evaluation_bytes


def test_the_first_strategy_that_fits_is_chosen(manifest: Manifest) -> None:
    """Cheapest in time first; a budget equal to the suggestion does."""
    candidates = plans(manifest, WORKLOAD, process_bytes=50 * MIB)
    resident, streamed = candidates
    assert choose(candidates, None) is resident
    assert choose(candidates, int(1.02 * resident.peak_bytes) + 1) is resident
    assert choose(candidates, int(1.02 * resident.peak_bytes) - 1) is streamed
    with pytest.raises(BudgetError, match="strategy streamed") as caught:
        choose(candidates, int(1.02 * streamed.peak_bytes) - 1)
    assert caught.value.required_bytes == streamed.smallest_budget_bytes
    assert choose(candidates, caught.value.required_bytes) is streamed
    assert caught.value.required_bytes % MIB == 0
    head = dataclasses.replace(streamed, process_bytes=streamed.process_bytes - 9 * MIB)
    with pytest.raises(BudgetError, match="; --trainable head fits with "):
        choose(candidates, int(1.02 * streamed.peak_bytes) - 1, [head])


def test_a_bundle_without_training_has_no_plans(manifest: Manifest) -> None:
    """And says how to get them."""
    with pytest.raises(UsageError, match="--no-train"):
        plans(dataclasses.replace(manifest, strategies=()), WORKLOAD, 0)


def test_a_run_that_does_not_fit_names_what_would(manifest: Manifest) -> None:
    """And that budget does."""

    def check(budget_bytes: int) -> None:
        check_run(manifest.inference_memory, budget_bytes, 50 * MIB, shape=(4, 10), rank=2)

    with pytest.raises(BudgetError, match="4 rows of 10 tokens need") as caught:
        check(50 * MIB)
    assert 62 * MIB < caught.value.required_bytes < 70 * MIB
    check(caught.value.required_bytes)


def test_the_suggested_budget_has_a_margin() -> None:
    """Whole mebibytes, more than the peak, and enough for a process that is a little larger."""
    plan = Plan("resident", True, 50 * MIB, 0, 0, 0, 0)
    assert plan.smallest_budget_bytes == 52 * MIB
    later = dataclasses.replace(plan, process_bytes=int(50.9 * MIB))
    assert later.fits(plan.smallest_budget_bytes)
    assert not later.fits(plan.smallest_budget_bytes - MIB)
