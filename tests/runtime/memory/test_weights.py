"""Weights that are mapped or read, and rows that are looked up in them."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepeft.bundle.manifest import TensorSpec, WeightTensor
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BundleError
from edgepeft.runtime.memory import system
from edgepeft.runtime.memory.process import read_memory, release_freed_memory
from edgepeft.runtime.memory.read_weights import ReadWeights
from edgepeft.runtime.memory.weights import MappedWeights, Weights

from .test_memory import falls, linux

ROWS, COLUMNS, OFFSET = 16_384, 1024, 4096
SPEC = TensorSpec("table", "float32", (ROWS, COLUMNS))
MIB = 2**20
OPEN: dict[str, Callable[[Bundle], Weights]] = {
    "mapped": MappedWeights,
    "read": lambda bundle: ReadWeights(bundle, 8 * MIB),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """64 MiB of float32 in a file, and a stand-in for the bundle it belongs to."""
    path = tmp_path_factory.mktemp("weights") / "weights.bin"
    values = np.arange(ROWS, dtype=np.float32)[:, None] + np.linspace(0, 0.5, COLUMNS, dtype=np.float32)
    path.write_bytes(bytes(OFFSET) + values.tobytes())
    manifest = SimpleNamespace(
        weights={"table": WeightTensor("float32", (ROWS, COLUMNS), OFFSET, values.nbytes)},
        weights_file="weights.bin",
    )
    return SimpleNamespace(manifest=manifest, file=lambda _: path), values


@pytest.fixture(params=[True, False], ids=["discards", "does not discard"])
def discards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system gives pages back while they are mapped; every system can be one that does not."""
    if not request.param:
        monkeypatch.setattr(system, "_discards", lambda: False)
    return system._discards()


@pytest.mark.usefixtures("discards")
@pytest.mark.parametrize("way", OPEN)
def test_rows_are_looked_up_and_forgotten(table: tuple[Bundle, np.ndarray], way: str) -> None:
    """By whatever index; all else is zeros, and so is what was looked up before a release."""
    bundle, values = table
    weights = OPEN[way](bundle)
    indices = np.array([[3, 3, ROWS - 1], [-2, 70, 0]])
    found = weights.looked_up("table", SPEC, indices)
    np.testing.assert_array_equal(found[indices], values[indices])
    assert not found[[1, 2, 71]].any()
    weights.release()
    # onnxruntime refuses the last two.
    again = weights.looked_up("table", SPEC, np.array([5, ROWS, -ROWS - 1]))
    np.testing.assert_array_equal(again[5], values[5])
    assert not again[indices].any()


@pytest.mark.parametrize("way", OPEN)
def test_a_view_is_the_file(table: tuple[Bundle, np.ndarray], way: str) -> None:
    bundle, values = table
    weights = OPEN[way](bundle)
    np.testing.assert_array_equal(weights.view("table", SPEC), values)
    np.testing.assert_array_equal(weights.rows("table", SPEC, 7, 9), values[7:9])


ROW = st.tuples(st.integers(0, 40), st.integers(1, 9))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["rows", "prefetch", "release"]), ROW), max_size=40))
def test_buffers_hold_what_they_are_asked_for(
    table: tuple[Bundle, np.ndarray], steps: list[tuple[str, tuple[int, int]]]
) -> None:
    """Rows that overlap, of many sizes, wanted again and announced for nothing, with room for ten of them:
    what was handed out since the last release never changes."""
    bundle, values = table
    weights = ReadWeights(bundle, 10 * 4096)
    handed: list[tuple[np.ndarray, np.ndarray]] = []
    for step, (first, count) in steps:
        if step == "rows":
            handed.append((weights.rows("table", SPEC, first, first + count), values[first : first + count]))
        elif step == "prefetch":
            weights.prefetch_rows("table", SPEC, first, first + count)
        else:
            weights.release()
            handed.clear()
        for found, expected in handed:
            np.testing.assert_array_equal(found, expected)


def test_a_system_that_cannot_read_past_its_cache(
    table: tuple[Bundle, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, values = table
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    np.testing.assert_array_equal(ReadWeights(bundle, MIB).rows("table", SPEC, 7, 9), values[7:9])


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    """While it is open; what was read beside the graphs is reported where it is wanted."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(OFFSET + 4 * 4096))
    manifest = SimpleNamespace(
        weights={"table": WeightTensor("float32", (4, COLUMNS), OFFSET, 4 * 4096)}, weights_file="weights.bin"
    )
    weights = ReadWeights(cast(Bundle, SimpleNamespace(manifest=manifest, file=lambda _: path)), MIB)
    os.truncate(path, OFFSET + 4096)
    weights.prefetch(["table"])
    with pytest.raises(BundleError, match="has become shorter"):
        weights.rows("table", TensorSpec("table", "float32", (4, COLUMNS)), 0, 4)


@linux
def test_looking_up_costs_its_rows(table: tuple[Bundle, np.ndarray], discards: bool) -> None:
    """128 scattered rows of 4 KiB: half a mebibyte, and not one page of the file. A release gives them back,
    with the last array where the system does not before."""
    bundle, _ = table
    weights = MappedWeights(bundle)
    indices = np.arange(64, ROWS, 128)
    before = read_memory()
    found = weights.looked_up("table", SPEC, indices)
    after = read_memory()
    weights.release()
    if not discards:
        assert found[indices[0]].any()  # what a session is still bound to stays as it is
        del found
    released = read_memory()
    grown = [cast(int, m.anonymous_bytes) - cast(int, before.anonymous_bytes) for m in (after, released)]
    assert len(indices) * 4096 <= grown[0] < MIB
    assert grown[1] < MIB // 4
    assert cast(int, after.file_bytes) - cast(int, before.file_bytes) < MIB


@falls
def test_released_weights_leave_the_process(table: tuple[Bundle, np.ndarray], discards: bool) -> None:
    """64 MiB of a map, by the system's account of the process; they come back as they were."""
    bundle, values = table
    weights = MappedWeights(bundle)
    release_freed_memory()  # what other tests left
    before_bytes = read_memory().resident_bytes
    found = weights.view("table", SPEC)
    np.testing.assert_array_equal(found[::64], values[::64])
    np.testing.assert_array_equal(found, values)
    assert read_memory().resident_bytes - before_bytes > 60 * MIB
    weights.release()
    if not discards:
        np.testing.assert_array_equal(found[5], values[5])
    del found
    release_freed_memory()  # what the comparisons took
    assert read_memory().resident_bytes - before_bytes < 8 * MIB
    np.testing.assert_array_equal(weights.rows("table", SPEC, 7, 9), values[7:9])


def test_weights_that_stay_are_not_released(table: tuple[Bundle, np.ndarray], discards: bool) -> None:
    """Where a budget has room for all of them."""
    del discards
    bundle, values = table
    weights = MappedWeights(bundle, stays=True)
    np.testing.assert_array_equal(weights.view("table", SPEC), values)
    before_bytes = read_memory().resident_bytes
    weights.release()
    assert before_bytes - read_memory().resident_bytes < 8 * MIB
