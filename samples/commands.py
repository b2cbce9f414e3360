"""Commands as a demo runs them, and an environment without what a device lacks."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ABSENT_ON_DEVICE = ("torch", "transformers", "peft", "optimum", "onnx", "onnxscript", "onnx_ir")
EDGEPEFT = Path(sys.executable).with_name("edgepeft")


def device_environment(folder: Path) -> dict[str, str]:
    """An environment in which importing what a device does not have fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ABSENT_ON_DEVICE:
        (folder / f"{name}.py").write_text(f'raise ImportError("the device side imports {name}")\n', "utf-8")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(*command: str | Path, environment: dict[str, str] | None = None, shows: bool = False) -> str:
    """Print and run a command; returns its standard output, or nothing where it `shows` it instead. A failure
    ends the demo with its exit code."""
    given = [str(part) for part in command]
    print("\n$ " + shlex.join([Path(given[0]).name, *given[1:]]), file=sys.stderr, flush=True)
    done = subprocess.run(given, env=environment, stdout=None if shows else subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""
