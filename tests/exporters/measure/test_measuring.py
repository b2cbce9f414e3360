"""How graphs are measured: at few sizes where these tell all, and in processes that end with the export."""

import dataclasses
import itertools
import subprocess
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from edgepeft.bundle.memory_formula import MemoryFormula, MemoryTerm
from edgepeft.errors import ExportError
from edgepeft.exporters.measure import probe
from edgepeft.exporters.measure.processes import Processes
from edgepeft.exporters.measure.tensors import Grid, Size, fit_peaks

GRID = Grid((2, 4, 6), (4, 7, 10), (1, 3))
FEW = dataclasses.replace(GRID, is_sparse=True)
MIB = 2**20


def attention(size: Size) -> list[float]:
    """What three nodes of a transformer hold."""
    b, s, r, _ = size
    return [4.0 * b * s * 64, 4.0 * b * s * 64 + 16 * b * s * s, 100 + 4 * b * s * r + 4 * s * s]


def contrasted(size: Size) -> list[float]:
    """A loss that compares every text with every other."""
    return [*attention(size), 4.0 * size[0] ** 2]


def test_few_sizes_tell_what_all_do() -> None:
    few, every = (np.array([attention(size) for size in grid.sizes]) for grid in (FEW, GRID))
    assert (len(few), len(every)) == (10, 18)
    last = GRID.sizes[-1]
    assert last not in FEW.sizes
    assert FEW.foretells(few, last, np.array(attention(last)))
    found, expected = fit_peaks(few, FEW), fit_peaks(every, GRID)
    assert len(found) == len(expected)
    sizes = itertools.product((1, 5), (3, 200), (1, 16))
    formulas = [MemoryFormula(0, peaks) for peaks in (found, expected)]
    assert all(formulas[0].activation_bytes(*size) == formulas[1].activation_bytes(*size) for size in sizes)


def test_what_few_sizes_do_not_tell_is_noticed() -> None:
    few, last = np.array([contrasted(size) for size in FEW.sizes]), GRID.sizes[-1]
    assert not FEW.foretells(few, last, np.array(contrasted(last)))


@pytest.mark.parametrize(
    ("role", "width", "larger"),
    [("decoder", 2**17, (6, 64)), ("stages", 2**17, (18, 64)), ("decoder", 2**15, (18, 64))],
)
def test_whole_graphs_that_are_large_run_a_smaller_batch(
    role: str, width: int, larger: tuple[int, int]
) -> None:
    """A session of 10 MiB and an arena with a fifth of gaps are found at either size."""
    tensors = MemoryFormula(0, ((MemoryTerm(float(width), 1, 1),),))
    ran = []

    def output(_self: Processes, _module: str, *arguments: object) -> str:
        batch, length, nbytes = map(int, map(str, arguments[2:]))
        ran.append((batch, length))
        return str(int(10 * MIB + 1.2 * nbytes))

    with patch.object(Processes, "output", output):
        formula = probe.with_session(Processes(), Path("bundle"), role, tensors, 1, 2048)
    assert ran == [probe.SIZE, (larger[0], 16), larger]
    assert formula.arena_gaps == pytest.approx(0.2)
    assert formula.session_bytes == pytest.approx(10 * MIB, abs=2)


def test_a_process_that_fails_names_the_graph_and_why() -> None:
    with Processes() as processes, pytest.raises(ExportError, match=r"the graph 'train' failed: .*nowhere"):
        processes.output("peaks", "nowhere", "train", 1, 1)


def test_leaving_ends_what_runs(tmp_path: Path) -> None:
    """An export that is interrupted does not wait for what it measured, and starts nothing more."""
    errors = []

    def measure() -> None:
        try:
            processes.output("probe", tmp_path, "train", 1, 1, 1)
        except ExportError as error:
            errors.append(str(error))

    sleeping = ["sleep", "60"]
    popen = subprocess.Popen
    patched = patch.object(subprocess, "Popen", lambda _, **options: popen(sleeping, **options))
    with Processes() as processes, patched:
        thread = threading.Thread(target=measure)
        thread.start()
        while not processes._running:
            time.sleep(0.01)
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    with pytest.raises(ExportError, match="broken off"):
        processes.output("probe", tmp_path, "train", 1, 1, 1)
