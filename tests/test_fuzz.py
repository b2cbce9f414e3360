"""Some damaged files of every kind; `python -m tests.fuzz --count N --seconds S` reads more of them."""

import sys

import pytest

from tests.programs import run

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


def read(*arguments: str) -> None:
    assert " 0 faulty" in run("tests.fuzz", *arguments)


def test_a_damaged_file_is_read_or_refused_in_one_line() -> None:
    """A few of every kind that a device reads."""
    read(*DEVICE, "--count", "40", "--seconds", "5")


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused_in_one_line() -> None:
    """And of ONNX files to export."""
    read("--count", "1000", "--seconds", "20")
