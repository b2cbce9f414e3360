"""Ctrl-C in a real export, in every long stage of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("stage", ["differentiating and writing", "measuring memory", "verifying"])
def test_nothing_is_left_behind(tmp_path: Path, stage: str) -> None:
    """One line, no bundle, and no temporary folder beside it or among the system's."""
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    system = tmp_path / "tmp"
    system.mkdir()
    command = [sys.executable, "-m", "edgepeft.cli", "export", "bert", "-o", "new.edge", "--rank", "2"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(system)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage):
                break
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert told.splitlines()[-1] == "error: interrupted (SIGINT)"
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "tmp"]
    assert not list(system.glob("edgepeft-*"))
