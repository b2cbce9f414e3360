"""Ctrl-C and SIGTERM, as real signals: an update is saved and says how to go on, nothing is half written."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgepeft
from edgepeft.adapters import save_adapter
from edgepeft.bundle import adapter_store as store
from edgepeft.bundle import reader
from edgepeft.files import atomic_folder
from edgepeft.runtime import model
from edgepeft.runtime.bench import run as bench

from ..runtime import tiny
from .test_commands import run

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's"),
    pytest.mark.usefixtures("ctrl_c"),
]

PROGRAM = [sys.executable, "-m", "edgepeft.cli"]
STEPS = 600
"""Some hundred milliseconds at least, and all that an interrupt at the first has left to do."""


def start(*arguments: object, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]", number: int, at: str) -> tuple[str, str]:
    """Send a signal once standard error begins a line with `at`; what it writes then."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(at):
            break
    process.send_signal(number)
    return process.communicate(timeout=60)


@pytest.fixture
def folder(classifier: Path, tmp_path: Path) -> Path:
    """A working directory with a bundle, and records in a file whose name a shell would take apart."""
    shutil.copytree(classifier, tmp_path / "tiny.edge")
    lines = [json.dumps(record) for record in tiny.records()]
    (tmp_path / "anna's data.jsonl").write_text("\n".join(lines))
    return tmp_path


ADAPT = ("adapt", "tiny.edge", "--data", "anna's data.jsonl", "--budget", "4GiB", "--batch-size", 4)


def test_an_interrupted_update_goes_on_by_the_printed_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, then SIGTERM with JSON; the command run verbatim by a shell, to the bits of an update that was
    left alone."""
    arguments = (*ADAPT, "-o", "out", "--steps", STEPS, "--lr", 0.001)
    process = start(*arguments, folder=folder)
    out, told = end(process, signal.SIGINT, "adapting: 1 of")
    notice, line, command = told.splitlines()
    assert (process.returncode, out) == (130, "")
    assert notice.startswith("SIGINT: finishing step ")
    assert line.startswith("error: interrupted (SIGINT) after step ")
    assert line.endswith(f" of {STEPS}; the work so far is in out.checkpoint; go on with:")
    assert command.endswith("--lr 0.001 --resume")
    assert sorted(path.name for path in folder.iterdir()) == [
        "anna's data.jsonl",
        "out.checkpoint",
        "tiny.edge",
    ]

    again = start(*arguments, "--resume", "--json", folder=folder)
    out, told = end(again, signal.SIGTERM, "adapting: ")
    error = json.loads(out)["error"]
    assert (again.returncode, error["exit_code"], error["type"]) == (143, 143, "Interrupted")
    assert error["go_on"] == f"{command} --json"
    assert "error" not in told

    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    assert "(kept, started from" in done.stdout
    monkeypatch.chdir(folder)
    assert run(*ADAPT, "-o", "straight", "--steps", STEPS, "--lr", 0.001).exit_code == 0
    tensors = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("out", "straight")]
    assert tensors[0] == tensors[1]
    resumed = json.loads((folder / "out" / "adapt_report.json").read_text())["resumed_from_step"]
    assert 2 <= resumed < STEPS
    assert not (folder / "out.checkpoint").exists()


def test_before_the_first_step_there_is_nothing_to_resume(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is the user's own; with standard input, the records have to come again."""
    monkeypatch.setattr("edgepeft.runtime.training.adapt.prepare", interrupt)
    arguments = ("adapt", classifier, "--data", "-", "--budget", "4GiB", "-o", tmp_path / "out")
    told = run(*arguments)
    assert told.exit_code == 130
    error, command = told.stderr.splitlines()
    assert error == (
        "error: interrupted (SIGINT) before the first step; there is nothing to save; standard input has to "
        "bring the same records again; go on with:"
    )
    assert command.endswith(f"--budget 4GiB -o {tmp_path / 'out'}")
    note, error, command = run(*arguments, "--resume").stderr.splitlines()
    assert note.endswith("out.checkpoint is not there: there is nothing to resume, so this one begins")
    assert "before another step; the checkpoint is as it was" in error
    assert command.endswith(f"-o {tmp_path / 'out'} --resume")


def test_a_judged_update_that_is_interrupted_is_judged_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step nothing is held back: all of it is saved."""
    monkeypatch.chdir(folder)
    arguments = (*ADAPT, "-o", "out", "--steps", 5)
    with monkeypatch.context() as patch:
        patch.setattr("edgepeft.runtime.training.adapt.AdaptReport", interrupt)
        told = run(*arguments)
    assert told.exit_code == 130
    assert "after step 5 of 5; the work so far is in out.checkpoint" in told.stderr
    report = json.loads(run(*arguments, "--resume", "--json").stdout)
    assert (report["resumed_from_step"], report["steps"]) == (5, 5)


def interrupt(*_: object, **__: object) -> None:
    """What a terminal does."""
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "BUNDLE"),
        ("plan", "BUNDLE", "--budget", "1GiB"),
        ("generate", "BUNDLE", "--prompt", "w1"),
        ("predict", "BUNDLE", "--data", "-"),
        ("bench", "BUNDLE"),
        ("adapter", "list", "BUNDLE"),
        ("adapter", "add", "BUNDLE", "a=./a"),
        ("adapter", "remove", "BUNDLE", "mine"),
        ("adapter", "export", "BUNDLE", "mine", "-o", "out"),
    ],
    ids=" ".join,
)
def test_any_other_command_ends_in_one_line(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    as_json: bool,
) -> None:
    """Or in one JSON document; it leaves nothing behind, and the handlers of before are back."""
    monkeypatch.chdir(tmp_path)
    for module in (reader, model, bench):
        monkeypatch.setattr(module, "open_bundle", interrupt)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    arguments = [classifier if word == "BUNDLE" else word for word in command]
    ended = run(*arguments, *(["--json"] if as_json else []))
    assert ended.exit_code == 130
    if as_json:
        error = {"type": "Interrupted", "message": "interrupted (SIGINT)", "exit_code": 130}
        assert json.loads(ended.stdout) == {"error": error}
        assert ended.stderr == ""
    else:
        assert (ended.stdout, ended.stderr) == ("", "error: interrupted (SIGINT)\n")
    assert not list(tmp_path.iterdir())
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_an_export_leaves_the_bundle_that_was_there(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no temporary folder."""
    bundle = tmp_path / "tiny.edge"
    shutil.copytree(classifier, bundle)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    (tmp_path / "model").mkdir()

    def export(_: str, output: Path, report: Callable[[str], None], **__: Any) -> None:
        with atomic_folder(output, "manifest.json") as folder:
            (folder / "weights.bin").write_bytes(b"half of it")
            report("writing")
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(vars(edgepeft), "export", export)  # without looking it up, which imports torch
    ended = run("export", tmp_path / "model", "-o", bundle)
    assert (ended.exit_code, ended.stdout) == (143, "")
    assert ended.stderr == "writing\nerror: interrupted (SIGTERM)\n"
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.edge"]


def test_an_adapter_that_is_being_added_is_added_whole(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one after it is not; the result says so."""
    bundle = tmp_path / "tiny.edge"
    shutil.copytree(classifier, bundle)
    for name in ("a", "b"):
        save_adapter(tiny.adapter(trained=True), tmp_path / name)
    write = store.write_manifest

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # between the folder and the manifest
        write(*arguments)

    monkeypatch.setattr(store, "write_manifest", interrupted)
    ended = run("adapter", "add", bundle, f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--json")
    told = json.loads(ended.stdout)
    assert (ended.exit_code, told["added"], told["error"]["exit_code"]) == (130, ["a"], 130)
    listed = json.loads(run("adapter", "list", bundle, "--json").stdout)
    assert [(item["name"], item["in_manifest"]) for item in listed] == [("mine", True), ("a", True)]


def test_a_benchmark_ends_with_its_processes(folder: Path) -> None:
    """A real signal to a real one, in the middle of a phase."""
    process = start("bench", "tiny.edge", "--steps", 500, folder=folder)
    out, told = end(process, signal.SIGTERM, "measuring load")
    assert (process.returncode, out) == (143, ""), told
    assert told.splitlines()[-1] == "error: interrupted (SIGTERM)"
    assert "Traceback" not in told
    assert sorted(path.name for path in folder.iterdir()) == ["anna's data.jsonl", "tiny.edge"]


HELD = """
import sys, time
from edgepeft.cli.interrupts import Interrupts
with Interrupts() as interrupts:
    interrupts.hold("finishing step 3")
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
"""


def test_a_second_one_ends_at_once() -> None:
    """By the signal itself, however long what is being finished takes."""
    process = subprocess.Popen([sys.executable, "-c", HELD], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "SIGINT: finishing step 3; once more ends at once\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT


def test_what_was_ignored_stays_ignored(classifier: Path) -> None:
    """As a shell's background job is started."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("inspect", classifier).exit_code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_another_program_turned_into_an_error(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an import of a module written in C does."""

    def swallow(*_: object, **__: object) -> None:
        try:
            interrupt()
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("edgepeft.bundle.reader.open_bundle", swallow)
    ended = run("inspect", classifier)
    assert (ended.exit_code, ended.stderr) == (130, "error: interrupted (SIGINT)\n")
