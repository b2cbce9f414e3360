"""The notebook runs from its first cell to its last, and none of its outputs is kept in the repository."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
NOTEBOOK = nbformat.read(SAMPLES / "notebook.ipynb", as_version=4)


def test_no_outputs_are_kept():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK.cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    shutil.copy(SAMPLES / "docstrings.py", tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    client = NotebookClient(NOTEBOOK, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    executed = client.execute()
    texts = [output.get("text", "") for cell in executed.cells for output in cell.get("outputs", ())]
    assert any(" before, " in text for text in texts)
