"""The tests' own programs, in processes of their own: who forks must have no threads, which a fork loses."""

import os
import subprocess
import sys
from pathlib import Path


def run(module: str, *arguments: str) -> str:
    """What `python -m MODULE` prints; it has to end well."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
