"""The benchmarks' machinery, on a toy: sides are started, stepped in turn and asked for their memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory, predictions
from benchmarks.compare import Command, SideEndedError, compare
from edgepeft.errors import CgroupError
from edgepeft.runtime.memory.cgroup import MemoryCgroup

from .runtime import tiny

MIB = 2**20

LINE = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    if line.strip() == "end":
        print(json.dumps({"peak_bytes": PEAK, "anonymous_bytes": 1, "file_bytes": 1}), flush=True)
        break
    print(json.dumps({"step_s": STEP * (number + 1), "loss": 1.0 / (number + 1)}), flush=True)
"""


def side(step_s: float, peak_bytes: int, limit_bytes: int | None = None) -> Command:
    code = LINE.replace("STEP", str(step_s)).replace("PEAK", str(peak_bytes))
    return Command([sys.executable, "-c", code], limit_bytes)


def test_ratios_are_to_the_first_side_and_the_first_round_does_not_count() -> None:
    said: list[str] = []
    compared = compare({"peer": side(2.0, 100), "ours": side(1.0, 25)}, 3, said.append)
    peer, ours = compared.rows()
    assert (peer["step_ratio"], ours["step_ratio"], ours["peak_ratio"]) == (1.0, 0.5, 0.25)
    assert (ours["rounds"], ours["step_s"], ours["first_loss"], ours["last_loss"]) == (3, 3.0, 1 / 2, 1 / 4)
    assert said[0] == "starting peer"


def test_a_side_that_dies_ends_the_comparison() -> None:
    dead = Command([sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(SideEndedError, match=r"ours ended with exit code 3$") as caught:
        compare({"peer": side(1.0, 1), "ours": dead}, 1, lambda _: None)
    assert (caught.value.exit_code, caught.value.killed) == (3, False)


def test_a_side_in_a_cgroup_starts_first_and_is_killed_where_it_does_not_fit() -> None:
    try:
        MemoryCgroup(MIB).__exit__(None, None, None)
    except CgroupError as error:
        pytest.skip(str(error))
    said: list[str] = []
    rows = compare({"peer": side(2.0, 100), "ours": side(1.0, 25, 64 * MIB)}, 1, said.append).rows()
    assert said[:2] == ["starting ours", "starting peer"]
    assert [row["side"] for row in rows] == ["peer", "ours"]
    assert rows[0]["cgroup_peak_bytes"] is None
    assert rows[1]["cgroup_peak_bytes"] is None or MIB < rows[1]["cgroup_peak_bytes"] <= 64 * MIB
    with pytest.raises(SideEndedError, match="killed by the kernel"):
        compare({"peer": side(2.0, 100), "ours": side(1.0, 25, 2 * MIB)}, 1, said.append)


def test_a_budget_that_is_refused_is_a_row_too() -> None:
    row = {"shape": "toy", "seq_len": 8, "side": "ours", "outcome": "ran", "step_s": 1.5, "step_ratio": 0.5}
    row |= {"peak_bytes": 3 * MIB, "peak_ratio": 0.25, "anonymous_bytes": 2 * MIB, "cgroup_peak_bytes": None}
    refused = {"shape": "toy", "seq_len": 8, "side": "ours in 1MiB", "outcome": "refused"}
    *_, first, second = memory.table([row, refused]).splitlines()
    assert first == "| toy, 8 | ours | 1.500 | 0.50 | 3 | 0.25 | 2 |  |"
    assert second == "| toy, 8 | ours in 1MiB | refused |  |  |  |  |  |"


def test_a_side_that_its_budget_cannot_hold_says_so(tmp_path: Path) -> None:
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "text-generation")
    arguments = ["edgepeft", str(bundle), "--seq-len", "8", "--budget", "1MiB"]
    refused = Command([sys.executable, "-m", "benchmarks.side", *arguments])
    with pytest.raises(SideEndedError) as caught:
        compare({"ours": refused}, 1, lambda _: None)
    assert (caught.value.exit_code, caught.value.killed) == (3, False)


def test_the_page_has_the_predictions_that_were_measured() -> None:
    rows = predictions.read()
    assert predictions.table(rows) in predictions.PAGE.read_text(encoding="utf-8"), "run: make docs-memory"
    for row in rows:
        sizes = [size for size in predictions.SIZES[row.shape] if size == (row.batch_size, row.seq_len)]
        assert len(sizes) == 1
        assert row.predicted_bytes > 0 < row.measured_bytes


def test_a_strategy_can_be_forced(tmp_path: Path) -> None:
    """In a process of its own, since the plan's choice is replaced in it."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "text-generation")
    arguments = ["--run", str(bundle), "0", "1", "2", "8", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.predictions", *arguments]
    row = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert row["strategy"] == "resident"
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.2)
