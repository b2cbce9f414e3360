"""What a command says of its progress: lines in a pipe, one line at a terminal, nothing where it is quick."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgepeft.cli import progress as module
from edgepeft.cli.progress import Progress

from ..runtime import tiny
from .test_commands import FAST, run


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The progress's clock; its thread, which keeps real time, has nothing to say."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Progress, "_tick", lambda _: None)
    return clock


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The first, then one every five seconds with what is left of the time, and the last."""
    progress = Progress()
    progress.stage("adapting")
    for step in range(1, 101):
        clock.now_s += 0.2
        progress.update(step, 100, "steps", f"loss {step}", at_once=True)
    progress.close()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "adapting: 1 of 100 steps, loss 1",
        "adapting: 26 of 100 steps, 0:05, 0:15 left, loss 26",
        "adapting: 51 of 100 steps, 0:10, 0:10 left, loss 51",
        "adapting: 76 of 100 steps, 0:15, 0:05 left, loss 76",
        "adapting: 100 of 100 steps, 0:20, loss 100",
    ]


def test_what_is_left_is_told_by_this_run(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an update that is resumed, the steps before cost no time; hours have a number of their own."""
    progress = Progress()
    progress.stage("adapting")
    progress.update(900, 1000, "steps")
    clock.now_s += 3700
    progress.update(950, 1000, "steps")
    progress.close()
    assert capsys.readouterr().err == "adapting: 950 of 1000 steps, 1:01:40, 1:01:40 left\n"


def test_a_quick_command_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless it is to be said at once."""
    progress = Progress()
    progress.stage("opening the bundle")
    progress.update(1, 2, "records")
    clock.now_s += 1.9
    progress.update(2, 2, "records")
    progress.stage("predicting")
    progress.close()
    assert capsys.readouterr().err == ""
    progress = Progress()
    progress.stage("measuring load", at_once=True)
    clock.now_s += 61
    progress.stage("measuring train", at_once=True)
    progress.close()
    assert capsys.readouterr().err == "measuring load\nmeasuring load, 1:01\nmeasuring train\n"


def test_one_line_at_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written over, with nothing of a longer one left, and no wider than the terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    progress = Progress()
    progress.stage("adapting")
    for step, note in ((1, "loss " + "9" * 40), (5, "loss 5"), (10, "loss 0")):
        progress.update(step, 10, "steps", note, at_once=True)
        clock.now_s += 0.2
    progress.close()
    first, second, last, again = terminal.getvalue().removesuffix("\n").split("\r")[1:]
    assert first == f"adapting [#---------]: 1 of 10 steps, loss {'9' * 40}"[:59]
    assert second == "adapting [#####-----]: 5 of 10 steps, loss 5".ljust(59)
    assert last.rstrip() == again.rstrip() == "adapting [##########]: 10 of 10 steps, loss 0"


def test_a_silent_stage_is_seen_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the thread, in real seconds."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    progress = Progress()
    progress.stage("tracing")
    time.sleep(1.3)
    progress.close()
    assert capsys.readouterr().err.splitlines()[0] == "tracing, 0:01"


def test_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&1 | head -1` and a closed standard error end no work."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress()
        progress.stage("adapting", at_once=True)
        progress.close()


def test_predictions_over_many_records(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted after every run; results stay on standard output."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.records()))
    told = run("predict", classifier, "--data", data, "--batch-size", 16, "--json")
    counted = [line for line in told.stderr.splitlines() if line.startswith("predicting: ")]
    assert counted == ["predicting: 16 of 40 records", "predicting: 40 of 40 records"]
    assert len(json.loads(told.stdout)["records"]) == 40


def test_generation(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the text are counted where it is not shown as it comes."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    told = run("generate", language_model, "--prompt", "w1", "--max-new-tokens", 4)
    assert "generating: 1 of 4 tokens at most" in told.stderr
    shown = run("generate", language_model, "--prompt", "w1", "--max-new-tokens", 4, "--stream")
    assert (shown.stdout, shown.stderr) == (told.stdout, "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_an_update_at_a_terminal_and_in_a_pipe(classifier: Path, tmp_path: Path) -> None:
    """The same command, each time a process."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.records()))
    command = [sys.executable, "-m", "edgepeft.cli", "adapt", str(classifier), "--data", str(data)]
    command += ["--budget", "4GiB", "-o", str(tmp_path / "out"), "--json", *FAST]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [line for line in piped.stderr.splitlines() if line.startswith("adapting")]
    assert told[0].startswith("adapting: 1 of 30 steps, loss ")
    assert told[-1].startswith("adapting: 30 of 30 steps, ")
    assert json.loads(piped.stdout)["steps"] == 30
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while part := _read(ours):
            said += part
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["steps"] == 30
    os.close(ours)
    assert b"\radapting [----------]: 1 of 30 steps" in said  # after what took longer than two seconds
    assert b"\radapting [##########]: 30 of 30 steps" in said
    assert said.count(b"\n") == 1


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 2**16)
    except OSError:  # Linux's way of saying that the other side is closed
        return b""


def test_export_says_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and how many weights are calibrated."""
    import edgepeft

    def export(*_: Any, report: Any, progress: Any, **__: Any) -> None:
        report("calibrating")
        progress(0, 7)
        progress(7, 7)
        raise edgepeft.ExportError("enough")

    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    monkeypatch.setitem(vars(edgepeft), "export", export)
    told = run("export", tmp_path, "-o", tmp_path / "new").stderr.splitlines()
    assert told[-4:] == [
        "calibrating",
        "calibrating: 0 of 7 weights",
        "calibrating: 7 of 7 weights",
        "error: enough",
    ]
