"""The demo's picture says what it shows."""

import json
from pathlib import Path

import onnxruntime

from edgepeft.runtime.bench.machine import machine_name

from .test_docstrings import load_sample


def test_the_title_names_model_budget_and_machine(tmp_path: Path) -> None:
    """And the picture is drawn."""
    plot = load_sample("plot")
    timeline = [[0.0, 2**20, 2**20, 0], [1.0, 2**21, 2**21, 0]]
    report = {
        "model": "all-MiniLM-L6-v2",
        "strategy": "resident",
        "memory": {
            "budget_bytes": 384 * 2**20,
            "predicted_peak_bytes": 2**21,
            "timeline": timeline,
            "phases": [[0.0, "read records"], [0.5, "train"]],
        },
    }
    first, second = plot.title(report).splitlines()
    assert first == "all-MiniLM-L6-v2 learns in 384.0 MiB: resident memory of the whole process"
    assert second == f"{machine_name()}, onnxruntime {onnxruntime.__version__}"
    plot.memory(json.loads(json.dumps(report)), {"timeline": timeline}, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
