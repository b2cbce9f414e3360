"""Simulated systems without what only Linux has; `sitecustomize.py` says what each lacks."""

import os
from pathlib import Path

SYSTEMS = ("windows", "macos", "bare")


def environment(system: str) -> dict[str, str]:
    """The environment of a process that is to run on a simulated system."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "SIMULATED_SYSTEM": system}
