"""onnxruntime's wheels keep a device id and send usage data since 1.32; edgepeft's processes do neither."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def written_by(program: str, folder: Path, **environment: str) -> list[str]:
    """What a process leaves in its home and its folder for temporary files."""
    home = {"HOME": str(folder), "TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**kept, **home, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [path.name for path in folder.rglob("*")]


@pytest.mark.parametrize("module", ["edgepeft", "edgepeft.runtime.session", "edgepeft.cli.bench"])
def test_nothing_is_kept_for_telemetry(module: str, tmp_path: Path) -> None:
    program = f"import {module}; import onnxruntime; import time; time.sleep(0.2)"
    assert written_by(program, tmp_path) == []


def test_whoever_sets_it_decides(tmp_path: Path) -> None:
    program = "import edgepeft, os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    assert written_by(program, tmp_path, ORT_DISABLE_TELEMETRY="0") == []
