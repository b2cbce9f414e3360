"""What the process is said to hold, and what a run is predicted to need."""

import dataclasses
import mmap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgepeft.bundle.manifest import Manifest, Strategy
from edgepeft.bundle.memory_formula import MemoryFormula, MemoryTerm
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import BudgetError, UsageError
from edgepeft.runtime.memory import process
from edgepeft.runtime.memory.planner import Plan, Workload, check_run, choose, plans

MIB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def test_resident_memory_is_the_systems() -> None:
    """As psutil reads it, within what a test itself allocates."""
    assert abs(process.read_memory().resident_bytes - psutil.Process().memory_info().rss) < 4 * MIB


@linux
def test_anonymous_memory_is_told_from_mapped_files(tmp_path: Path) -> None:
    """16 MiB of each."""
    before = process.read_memory()
    block = np.ones(16 * MIB, np.uint8)
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
    assert block.sum() == 16 * MIB


@linux
def test_a_recorder_sees_a_peak_that_is_gone() -> None:
    """32 MiB for a tenth of a second; earlier peaks do not count where the kernel lets them be forgotten."""
    earlier = np.ones(96 * MIB, np.uint8)
    del earlier
    with process.MemoryRecorder(interval_s=0.005) as recorder:
        before = process.read_memory().resident_bytes
        block = np.ones(32 * MIB, np.uint8)
        time.sleep(0.1)
        del block
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


def test_other_systems_fall_back_to_the_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is no /proc, getrusage's peak stands for both figures."""
    monkeypatch.setattr(process, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(process, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    memory = process.read_memory()
    assert memory.resident_bytes == memory.peak_bytes >= psutil.Process().memory_info().rss * 0.9
    assert memory.anonymous_bytes is None
    assert not process.reset_peak()


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
    assert resident.peak_bytes == 50 * MIB + 30 * MIB + resident.activation_bytes + resident.state_bytes
    assert resident.state_bytes > 4 * 4 * 600 + 4 * 400
    assert streamed.training_bytes == 60 * MIB + streamed.activation_bytes + streamed.state_bytes
    assert streamed.evaluation_bytes > 12 * MIB
    eager = dataclasses.replace(streamed, session_bytes=0)
    assert eager.peak_bytes == 50 * MIB + eager.state_bytes + eager.evaluation_bytes


def test_the_first_strategy_that_fits_is_chosen(manifest: Manifest) -> None:
    """Cheapest in time first; a budget equal to the suggestion does."""
    candidates = plans(manifest, WORKLOAD, process_bytes=50 * MIB)
    resident, streamed = candidates
    assert choose(candidates, None) is resident
    assert choose(candidates, resident.peak_bytes) is resident
    assert choose(candidates, resident.peak_bytes - 1) is streamed
    with pytest.raises(BudgetError, match="strategy streamed") as caught:
        choose(candidates, streamed.peak_bytes - 1)
    assert caught.value.required_bytes == streamed.smallest_budget_bytes
    assert choose(candidates, caught.value.required_bytes) is streamed
    assert caught.value.required_bytes % MIB == 0


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
    """Whole mebibytes, and more than the peak."""
    plan = Plan("resident", True, 50 * MIB, 0, 0, 0, 0)
    assert plan.smallest_budget_bytes == 51 * MIB
