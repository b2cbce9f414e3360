"""`--json`: one document on standard output, whatever happens; walks every command that there is."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import edgepeft
from edgepeft import cli
from edgepeft.adapters import save_adapter
from edgepeft.errors import ExportError

from ..runtime import tiny
from .test_commands import run

#: What `edgepeft.export` returns, as far as the command reads it.
EXPORTED = SimpleNamespace(
    task="fill-mask",
    files={},
    model=SimpleNamespace(vocab_size=320, whole_vocab_size=None),
    quantization=SimpleNamespace(bits=4, calibration=None, bits_a_weight=5.0),
    pruning=None,
    adapters=(),
    slots=(),
    slots_of=lambda _: (),
    strategies=(SimpleNamespace(name="resident"),),
    missing={"streamed inference": "a", "checkpointed": "b", "streamed": "b"},
    verification={},
)


def test_export_says_what_a_bundle_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(edgepeft), "export", lambda *_, **__: EXPORTED)
    (tmp_path / "model").mkdir()
    result = run("export", tmp_path / "model", "-o", tmp_path / "b")
    assert (
        "training: resident\nwithout streamed inference: a\nwithout checkpointed, streamed: b"
        in result.stdout
    )
    result = run("export", tmp_path / "model", "-o", tmp_path / "b", "--json")
    assert json.loads(result.stdout)["missing"] == EXPORTED.missing


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names that lead to every command that is no group."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from leaves(found, (*path, name))
    else:
        yield path


COMMANDS = list(leaves(cli.main))

#: A command line of each that goes well, or ends in one of the device's own errors.
WORKING: dict[tuple[str, ...], tuple[str, ...]] = {
    ("export",): ("MODEL", "-o", "NEW"),
    ("inspect",): ("BUNDLE",),
    ("plan",): ("BUNDLE", "--budget", "4GiB"),
    ("generate",): ("LANGUAGE", "--prompt", "w1 w2", "--max-new-tokens", "2"),
    ("predict",): ("BUNDLE", "--data", "DATA"),
    ("adapt",): ("BUNDLE", "--data", "DATA", "--budget", "4GiB", "-o", "NEW", "--steps", "2"),
    ("adapter", "list"): ("BUNDLE",),
    ("adapter", "add"): ("COPY", "new=ADAPTER"),
    ("adapter", "remove"): ("COPY", "mine"),
    ("adapter", "export"): ("BUNDLE", "mine", "-o", "NEW"),
    ("bench",): ("BUNDLE", "--steps", "1", "--seq-len", "4"),
}


def document(exit_code: int, *arguments: object) -> Any:
    """What a command that ends with this code says: one document; standard error is for progress only."""
    ended = run(*arguments)
    assert ended.exit_code == exit_code, ended.output
    assert "error" not in ended.stderr
    return json.loads(ended.stdout)


def error_of(exit_code: int, *arguments: object) -> dict[str, Any]:
    """The error of a command that has nothing else to say."""
    told = document(exit_code, *arguments)
    assert told.keys() == {"error"}
    error: dict[str, Any] = told["error"]
    assert error["exit_code"] == exit_code
    assert error["message"] == " ".join(error["message"].split())
    return error


def test_every_command_is_tried() -> None:
    """A new one belongs into the table above."""
    assert sorted(COMMANDS) == sorted(WORKING)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_wrong_usage_is_json(path: tuple[str, ...]) -> None:
    """Exit 2: an option that is none, an argument that is missing."""
    error = error_of(2, *path, "--nonsense", "--json")
    assert error["type"] == "UsageError"
    assert "No such option '--nonsense'" in error["message"]
    assert error["message"].endswith(f"(see edgepeft {' '.join(path)} --help)")
    assert "Missing argument" in error_of(2, *path, "--json")["message"]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_failure_is_json(path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 1 and the error's class: there is no such bundle, or the model cannot be exported."""

    def refuse(*_: object, **__: object) -> None:
        raise ExportError("the model\ncannot be exported")

    monkeypatch.setitem(vars(edgepeft), "export", refuse)
    monkeypatch.chdir(tmp_path)
    error = error_of(1, *path, *WORKING[path], "--json")
    if path == ("export",):
        assert error == {"type": "ExportError", "message": "the model cannot be exported", "exit_code": 1}
    else:
        assert error["type"] == "BundleError"
        assert error["message"].endswith("no such bundle")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_result_is_json(
    path: tuple[str, ...],
    classifier: Path,
    language_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One document, without an error."""
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    data.write_text("\n".join(json.dumps(record) for record in tiny.records()))
    model.mkdir()
    save_adapter(tiny.adapter(trained=True), tmp_path / "adapter")
    monkeypatch.setitem(vars(edgepeft), "export", lambda *_, **__: EXPORTED)
    places = {
        "BUNDLE": classifier,
        "LANGUAGE": language_model,
        "MODEL": model,
        "DATA": data,
        "NEW": tmp_path / "new",
        "COPY": tiny.write_bundle(tmp_path / "copy"),
        "new=ADAPTER": f"new={tmp_path / 'adapter'}",
    }
    told = document(0, *path, *(places.get(word, word) for word in WORKING[path]), "--json")
    assert told
    assert "error" not in told


def test_what_is_wrong_before_a_command_is_known() -> None:
    """A command, and an option of the program's own."""
    assert "did you mean adapt" in error_of(2, "adaptt", "--json")["message"]
    assert "did you mean list?" in error_of(2, "adapter", "lst", "--json")["message"]
    assert "--nonsense" in error_of(2, "--nonsense", "--json")["message"]


def test_a_value_is_no_option(language_model: Path) -> None:
    """`--json` as a text to continue asks for none."""
    ended = run("generate", language_model, "--prompt", "--json", "--top-k", 3)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")


def test_a_refused_budget_stands_in_the_plan(classifier: Path) -> None:
    """The result that there is and the error are one document, with the figures as numbers."""
    told = document(3, "plan", classifier, "--budget", "1MiB", "--json")
    assert told["strategies"][0]["strategy"] == "resident"
    assert (told["error"]["type"], told["error"]["budget_bytes"]) == ("BudgetError", 2**20)
    assert told["error"]["required_bytes"] == told["smallest_budget_bytes"]


def test_the_devices_are_json() -> None:
    """Wherever the option stands."""
    for arguments in (("--device", "list", "--json"), ("--json", "--device", "list")):
        devices = json.loads(run("plan", *arguments).stdout)
        assert devices[0]["name"] == "pi-zero-2w"
        assert devices[0]["budget_bytes"] == 256 * 2**20


def test_a_fault_of_the_program_is_json_with_its_traceback(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exception goes on, so that Python shows where."""

    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("edgepeft.bundle.reader.open_bundle", fault)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(classifier), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"type": "ZeroDivisionError", "message": "division by zero", "exit_code": 1}


def test_a_system_error_is_one_line(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a permission that is missing."""

    def denied(path: str, **_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("edgepeft.bundle.reader.open_bundle", denied)
    ended = run("inspect", classifier)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {classifier}: Permission denied\n"
