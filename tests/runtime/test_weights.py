"""Weights that are mapped, and rows that are looked up in them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from edgepeft.bundle.manifest import TensorSpec, WeightTensor
from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.memory.process import read_memory
from edgepeft.runtime.memory.weights import MappedWeights

ROWS, COLUMNS, OFFSET = 16_384, 1024, 4096
SPEC = TensorSpec("table", "float32", (ROWS, COLUMNS))
MIB = 2**20


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


def test_rows_are_looked_up_and_forgotten(table: tuple[Bundle, np.ndarray]) -> None:
    """By whatever index; all else is zeros, and so is everything after a release."""
    bundle, values = table
    weights = MappedWeights(bundle)
    indices = np.array([[3, 3, ROWS - 1], [-2, 70, 0]])
    found = weights.looked_up("table", SPEC, indices)
    np.testing.assert_array_equal(found[indices], values[indices])
    assert not found[[1, 2, 71]].any()
    weights.release()
    assert not found[indices].any()
    again = weights.looked_up(
        "table", SPEC, np.array([5, ROWS, -ROWS - 1])
    )  # onnxruntime refuses the last two
    np.testing.assert_array_equal(again[5], values[5])


def test_a_view_is_the_file(table: tuple[Bundle, np.ndarray]) -> None:
    bundle, values = table
    weights = MappedWeights(bundle)
    np.testing.assert_array_equal(weights.view("table", SPEC), values)
    np.testing.assert_array_equal(weights.rows("table", SPEC, 7, 9), values[7:9])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_looking_up_costs_its_rows(table: tuple[Bundle, np.ndarray]) -> None:
    """128 scattered rows of 4 KiB: half a mebibyte, and not one page of the file."""
    bundle, _ = table
    weights = MappedWeights(bundle)
    indices = np.arange(64, ROWS, 128)
    before = read_memory()
    weights.looked_up("table", SPEC, indices)
    after = read_memory()
    weights.release()
    released = read_memory()
    grown = [cast(int, m.anonymous_bytes) - cast(int, before.anonymous_bytes) for m in (after, released)]
    assert len(indices) * 4096 <= grown[0] < MIB
    assert grown[1] < MIB // 4
    assert cast(int, after.file_bytes) - cast(int, before.file_bytes) < MIB
