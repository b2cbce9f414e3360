"""Every budget from plenty to nothing, inside a memory cgroup of its size: done or refused, never killed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.budget_sweep import RATE, picture, recording, sweep
from edgepeft.bundle.manifest import AudioPreprocessing
from edgepeft.errors import BudgetError, CgroupError, UpdateRejectedError
from edgepeft.runtime.memory.cgroup import MemoryCgroup
from edgepeft.runtime.preprocessing.audio import read_audio
from edgepeft.runtime.preprocessing.images import read_image

MIB = 2**20
#: Python itself, without any package, needs about 13 MiB.
SIZES_MIB = [*range(160, 60, -5), *range(60, 15, -5), 16]


@pytest.mark.slow
def test_no_budget_kills(tied_llama: Path, tmp_path: Path) -> None:
    """Thirty sizes of budget and cgroup; what is refused is refused before the first step."""
    rng = np.random.default_rng(0)
    rows = rng.integers(3, 300, (12, 24)).tolist()
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    endings = []
    for size in SIZES_MIB:
        output = tmp_path / f"adapter-{size}"
        command = [sys.executable, "-m", "edgepeft.cli", "adapt", str(tied_llama)]
        command += ["--data", str(data), "--budget", f"{size}MiB", "--steps", "3", "--batch-size", "2"]
        try:
            group = MemoryCgroup(size * MIB)
        except CgroupError as error:
            pytest.skip(str(error))
        with group:
            done = subprocess.run(
                group.command([*command, "-o", str(output)]), capture_output=True, text=True, check=False
            )
            assert group.oom_kills in (None, 0), f"killed at {size} MiB"
        refused = done.returncode == BudgetError.exit_code
        assert refused or done.returncode in (0, UpdateRejectedError.exit_code), done.stderr
        if refused:
            assert "the budget is" in done.stderr
            assert not [path for path in tmp_path.iterdir() if output.name in path.name.split(".")]
        endings.append(refused)
    assert not endings[0]
    assert endings[-1]
    assert endings == sorted(endings), "a smaller budget was met where a larger one was refused"


def test_a_sweep_has_pictures_and_recordings_that_are_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [picture(tmp_path, number, generator) for number in range(8)]
    assert len({Path(name).suffix for name in pictures}) == 3
    assert len({read_image(tmp_path / name, 3).shape for name in pictures}) == 8
    settings = AudioPreprocessing(RATE, normalize=True)
    for number in range(6):
        name = recording(tmp_path, number, 1000, generator)
        assert len(read_audio(tmp_path / name, settings, 10_000)) == (1000 if number % 3 else 2000)


@pytest.mark.slow
def test_budgets_are_true(tied_llama: Path, tmp_path: Path) -> None:
    """A few random updates: each ends by itself, as predicted, and `plan` says the same."""
    outcomes = sweep([tied_llama], 6, 0, "", tmp_path / "results.jsonl", print)
    assert [fault for outcome in outcomes for fault in outcome.faults] == []
    assert len((tmp_path / "results.jsonl").read_text("utf-8").splitlines()) == 6
