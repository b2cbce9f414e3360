"""The benchmarks' machinery, on a toy: sides are started, stepped in turn and asked for their memory."""

import sys

import pytest

from benchmarks.compare import Command, SideEndedError, compare
from edgepeft.errors import CgroupError
from edgepeft.runtime.memory.cgroup import MemoryCgroup

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
