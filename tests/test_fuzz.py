"""Some damaged files of every kind; `python -m tests.fuzz --count N --seconds S` reads more of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
DEVICE = [
    "manifest",
    "inference-graph",
    "training-graph",
    "weights",
    "tokenizer",
    "tokenizer-config",
    "chat-template",
    "adapter-config",
    "adapter-tensors",
    "onnx-adapter",
    "data",
    "png",
    "jpeg",
    "ppm",
    "array",
    "wav",
    "checkpoint",
    "report",
    "features",
    "prompt-cache",
]


def run(*arguments: str) -> None:
    """In a process of its own, which forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faulty" in done.stdout


def test_a_damaged_file_is_read_or_refused_in_one_line() -> None:
    """A few of every kind that a device reads."""
    run(*DEVICE, "--count", "40", "--seconds", "5")


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused_in_one_line() -> None:
    """And of ONNX files to export."""
    run("--count", "1000", "--seconds", "20")
