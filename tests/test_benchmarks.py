"""The benchmarks' machinery, on a toy: sides are started, stepped in turn and asked for their memory."""

import sys

import pytest

from benchmarks.compare import compare

LINE = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    if line.strip() == "end":
        print(json.dumps({"peak_bytes": PEAK, "anonymous_bytes": 1, "file_bytes": 1}), flush=True)
        break
    print(json.dumps({"step_s": STEP * (number + 1), "loss": 1.0 / (number + 1)}), flush=True)
"""


def side(step_s: float, peak_bytes: int) -> list[str]:
    return [sys.executable, "-c", LINE.replace("STEP", str(step_s)).replace("PEAK", str(peak_bytes))]


def test_ratios_are_to_the_first_side_and_the_first_round_does_not_count() -> None:
    said: list[str] = []
    compared = compare({"peer": side(2.0, 100), "ours": side(1.0, 25)}, 3, said.append)
    peer, ours = compared.rows()
    assert (peer["step_ratio"], ours["step_ratio"], ours["peak_ratio"]) == (1.0, 0.5, 0.25)
    assert (ours["rounds"], ours["step_s"], ours["first_loss"], ours["last_loss"]) == (3, 3.0, 1 / 2, 1 / 4)
    assert said[0] == "starting peer"


def test_a_side_that_dies_ends_the_comparison() -> None:
    dead = [sys.executable, "-c", "import sys; sys.exit(3)"]
    with pytest.raises(RuntimeError, match="ours ended with exit code 3"):
        compare({"peer": side(1.0, 1), "ours": dead}, 1, lambda _: None)
