"""The commands: answers, one-line errors, exit codes, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import edgepeft
from edgepeft import cli
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.cli.options import adapter_spec
from edgepeft.errors import UsageError
from edgepeft.runtime import prediction

from ..runtime import tiny


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fails(exit_code: int, *arguments: object) -> str:
    """The error of a command that fails: one line on stderr, nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in tiny.records()))
    return path


FAST = ("--lr", "0.02", "--batch-size", "4", "--steps", "30")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    """And every option says what it is."""
    text = run(name, "--help")
    assert text.exit_code == 0
    assert text.output.count(f"edgepeft {name} ") >= 2  # the usage line and an example
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_the_group_lists_its_commands() -> None:
    """With version and help."""
    text = run("--help").output
    assert all(name in text for name in cli.COMMANDS)
    assert run("--version").output == f"edgepeft, version {edgepeft.__version__}\n"


@pytest.mark.parametrize("command", [(), ("adapter",)])
def test_commands_that_hold_commands_show_their_help(command: tuple[str, ...]) -> None:
    """Alone, which is no error."""
    alone, asked = run(*command), run(*command, "--help")
    assert (alone.exit_code, alone.stdout, alone.stderr) == (0, asked.stdout, "")
    assert "Commands:" in alone.stdout


def test_inspect(classifier: Path) -> None:
    """A table, and the same as JSON."""
    text = run("inspect", classifier).stdout
    assert "text-classification, 3 labels: red, green, blue" in text
    assert "mine: rank 2 on 1 modules" in text
    summary = json.loads(run("inspect", classifier, "--json").stdout)
    assert (
        summary["adapters"]["mine"]["parameters"] == load_adapter(classifier / "adapters" / "mine").parameters
    )
    assert summary["graphs"].keys() == {"inference", "loss", "train", "adamw", "grad_norm"}


def test_plan(classifier: Path) -> None:
    """It fits, or exit 3 with the table before the error."""
    plan = json.loads(run("plan", classifier, "--budget", "4GiB", "--json").stdout)
    assert plan["chosen"] == "resident"
    assert plan["strategies"][0]["peak_bytes"] < plan["smallest_budget_bytes"] < 4 * 2**30
    refused = run("plan", classifier, "--budget", "1MiB")
    assert refused.exit_code == 3
    assert "does not fit" in refused.stdout
    assert refused.stderr.startswith("error: training needs")
    assert f"--budget {plan['smallest_budget_bytes'] // 2**20}MiB"[:10] in refused.stderr


def test_plan_says_what_adapt_says(classifier: Path, tmp_path: Path) -> None:
    """The same figure for the same sizes, but for what two processes differ by."""
    data = tmp_path / "data.jsonl"
    texts = [f"w{1 + n % 3} w4 w5 w6" for n in range(20)]
    records = [{"text": text, "label": tiny.LABELS[n % 3]} for n, text in enumerate(texts)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))

    def told(command: str, *arguments: str) -> dict[str, Any]:
        line = [sys.executable, "-m", "edgepeft.cli", command, str(classifier), "--budget", "1GiB", "--json"]
        done = subprocess.run([*line, *arguments], capture_output=True, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    memory = told("adapt", "--data", str(data), "-o", str(tmp_path / "out"), *FAST)["memory"]
    assert min(memory["predicted"].values()) >= 0
    planned = told("plan", "--seq-len", "5", "--batch-size", "4")["strategies"][0]
    assert planned["peak_bytes"] == pytest.approx(memory["predicted_peak_bytes"], abs=2**20)
    for part, nbytes in memory["predicted"].items():
        assert planned[part] == pytest.approx(nbytes, abs=2**20)


def test_adapt_predict_and_the_adapter_in_between(classifier: Path, data: Path, tmp_path: Path) -> None:
    """The whole path on the device: predict, adapt, predict."""
    before = json.loads(run("predict", classifier, "--data", data, "--adapter", "mine", "--json").stdout)
    result = run("adapt", classifier, "--data", data, "--budget", "4GiB", "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.output
    assert "(kept, started from" in result.stdout
    assert "peak memory" in result.stdout
    after = json.loads(
        run("predict", classifier, "--data", data, "--adapter", tmp_path / "out", "--json").stdout
    )
    assert after["accuracy"] > before["accuracy"]
    assert len(after["records"]) == 40
    text = run("predict", classifier, "--data", data, "--adapter", tmp_path / "out").stdout
    assert text.splitlines()[-1] == f"accuracy {after['accuracy']:.4f}"


def test_results_are_written_as_they_come(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same whether they are few or many, at once or in parts; a record that cannot be used ends them."""
    command = ("predict", classifier, "--batch-size", 4, "--data")
    answer = json.loads(run(*command, data, "--json").stdout)
    text = run(*command, data).stdout
    monkeypatch.setattr(sys.modules["edgepeft.cli.predict"], "TOGETHER", 7)
    monkeypatch.setattr(prediction, "WINDOW_BYTES", 5 * 2**10)
    assert run(*command, data).stdout == text
    found = json.loads(run(*command, data, "--json").stdout)
    assert (found["task"], found["adapter"], found["accuracy"]) == (
        "text-classification",
        None,
        answer["accuracy"],
    )
    for record, want in zip(found["records"], answer["records"], strict=True):
        assert (record["label"], record["expected"]) == (want["label"], want["expected"])
        assert record["score"] == pytest.approx(want["score"], rel=1e-5)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data.read_text("utf-8") + '{"label": 0}\n')
    told = run(*command, broken, "--json")
    document = json.loads(told.stdout)
    assert (told.exit_code, len(document["records"])) == (1, 35)
    assert document["error"]["message"].startswith(f"{broken}:41: has the fields")


def test_a_record_with_nothing_to_learn_is_told_of(language_model: Path, tmp_path: Path) -> None:
    """On standard error, with its place; with and without JSON."""
    data = tmp_path / "data.jsonl"
    rows = [*tiny.sentences(8), {"input_ids": [3]}, *tiny.sentences(8)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ("adapt", language_model, "--data", data, "--budget", "4GiB", "-o", tmp_path / "out")
    note = f"note: records with nothing to learn are left out (1), first {data}:9: no token"
    for options in ((), ("--json",)):
        told = run(*command, "--steps", 2, "--lr", "1e-3", *options)
        assert (told.exit_code, note in told.stderr) == (0, True), told.output
    assert json.loads(told.stdout)["records"]["left_out"] == 1


def test_adapt_reports_in_json(classifier: Path, data: Path, tmp_path: Path) -> None:
    """The same report as in the output folder."""
    result = run(
        "adapt", classifier, "--data", data, "--budget", "4GiB", "-o", tmp_path / "out", "--json", *FAST
    )
    report = json.loads(result.stdout)
    written = json.loads((tmp_path / "out" / "adapt_report.json").read_text())
    assert report["losses"] == written["losses"]
    assert report["decision"] == "kept"
    assert "adapting" in result.stderr


def test_a_rejected_update_exits_4_with_its_report(classifier: Path, data: Path, tmp_path: Path) -> None:
    """And writes nothing."""
    good = run("adapt", classifier, "--data", data, "--budget", "4GiB", "-o", tmp_path / "good", *FAST)
    assert good.exit_code == 0
    arguments = ("adapt", classifier, "--data", data, "--budget", "4GiB", "--adapter", tmp_path / "good")
    rejected = run(*arguments, "-o", tmp_path / "bad", "--json", *FAST, "--lr", "5")
    assert rejected.exit_code == 4
    told = json.loads(rejected.stdout)
    assert told["decision"] == "rejected"
    assert told["error"]["exit_code"] == 4
    assert told["error"]["message"].startswith("the update is rejected: held-out loss went from")
    assert not (tmp_path / "bad").exists()


def test_generate(language_model: Path) -> None:
    """Text, and JSON."""
    text = run("generate", language_model, "--prompt", "w3 w4", "--max-new-tokens", "4").stdout.strip()
    answer = json.loads(
        run("generate", language_model, "--prompt", "w3 w4", "--max-new-tokens", "4", "--json").stdout
    )
    assert (answer["prompt"], answer["adapter"], answer["text"]) == ("w3 w4", None, text)
    assert (answer["prompt_tokens"], answer["cached_tokens"], answer["new_tokens"]) == (2, 0, 1)
    assert answer["finish_reason"] == "eos"


def test_predict_embeddings(encoder: Path, tmp_path: Path) -> None:
    """The table shows the beginning, JSON all of it."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"text": "w3"}\n')
    assert "1.0000" in run("predict", encoder, "--data", path).stdout
    answer = json.loads(run("predict", encoder, "--data", path, "--json").stdout)
    assert [len(record["embedding"]) for record in answer["records"]] == [tiny.WIDTH] * 2


@pytest.mark.parametrize(
    ("exit_code", "arguments", "message"),
    [
        (2, ("frobnicate",), "No such command 'frobnicate': there are export, inspect, plan"),
        (2, ("adaptt",), "No such command 'adaptt': did you mean adapt"),
        (2, ("adapter", "lst"), "No such command 'lst': did you mean list? (see edgepeft adapter --help)"),
        (2, ("adapt", "--stesp", "3"), "'--steps'"),
        (2, ("adapter", "add", "--dtype"), "requires an argument. (see edgepeft adapter add --help)"),
        (2, ("adapter", "add", "BUNDLE", "mine"), "mine: write NAME=PATH, such as mine=./my-adapter"),
        (2, ("adapt", "BUNDLE"), "Missing option '--data'"),
        (2, ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT"), "Missing option '--budget'"),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "0"),
            "--budget: '0' is no memory",
        ),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "lots"),
            "--budget: 'lots' is not a size",
        ),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "1GiB", "--steps", "many"),
            "--steps",
        ),
        (2, ("adapt", "BUNDLE", "--data", "DATA", "-o", "DATA", "--budget", "1GiB"), "exists and holds no"),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "BELOW", "--budget", "1GiB"),
            "data.jsonl is no folder: give another path",
        ),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "256"),
            "--budget: '256' is 256 bytes: write a unit, such as 256MiB",
        ),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "256M"),
            "write 256MiB (powers of 1024) or 256MB",
        ),
        (
            2,
            ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "1GiB", "--accumulate", "0"),
            "error: --accumulate is 0",
        ),
        (2, ("bench", "BUNDLE", "--plot", "BELOW"), "there is no folder"),
        (2, ("plan", "BUNDLE"), "such as --budget 256MiB"),
        (
            2,
            ("export", "DATA", "-o", "OUT"),
            "is a file, expected a model's folder, hub id, GGUF or ONNX file",
        ),
        (2, ("export", "NONE", "-o", "OUT"), "no such model's folder or file"),
        (2, ("export", "BUNDLE", "-o", "OUT"), "is a bundle already"),
        (
            2,
            ("export", "some/model", "-o", "DATA"),
            "exists and holds no manifest.json, so it is not replaced",
        ),
        (3, ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "1MiB"), "holds 48.0 MiB without"),
        (3, ("adapt", "BUNDLE", "--data", "DATA", "-o", "OUT", "--budget", "50MiB"), "--budget "),
        (1, ("adapt", "BUNDLE", "--data", "NONE", "-o", "OUT", "--budget", "1GiB"), "cannot be read"),
        (1, ("adapt", "NONE", "--data", "DATA", "-o", "OUT", "--budget", "1GiB"), "no such bundle"),
        (1, ("inspect", "DATA"), "expected a bundle's folder"),
        (1, ("predict", "BUNDLE", "--data", "DATA", "--adapter", "yours"), "has no adapter 'yours'"),
        (2, ("predict", "BUNDLE", "--data", "DATA", "--adapter", "mine=much"), "'much' is not a weight"),
        (2, ("predict", "BUNDLE", "--data", "DATA", "--seq-len", "99"), "--seq-len is 99"),
        (3, ("predict", "BUNDLE", "--data", "DATA", "--budget", "1MiB"), "the budget is 1.0 MiB"),
        (2, ("generate", "BUNDLE", "--prompt", "w1"), "use predict"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    classifier: Path, data: Path, tmp_path: Path, exit_code: int, arguments: tuple[str, ...], message: str
) -> None:
    """Nothing is written, nothing is printed on stdout."""
    places = {"BUNDLE": classifier, "DATA": data, "OUT": tmp_path / "out", "NONE": tmp_path / "none"}
    places["BELOW"] = data / "out"
    line = fails(exit_code, *(places.get(argument, argument) for argument in arguments))
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_bad_data_names_its_line(classifier: Path, data: Path, tmp_path: Path) -> None:
    """Malformed JSON, a label never seen at export, an empty file."""
    lines = data.read_text("utf-8").splitlines()
    for content, message in (
        ("\n".join([*lines[:2], '{"text": ', *lines[3:]]), "data.jsonl:3: is not JSON"),
        ("\n".join([*lines[:4], '{"text": "w1", "label": "mauve"}']), "data.jsonl:5: label 'mauve'"),
        (
            '{"text": "w1", "label": "mauve"}',
            "knows 3: red, green, blue. Use these, or export the model with",
        ),
        ('{"txt": "w1", "lbl": "red"}', "1: has the fields 'txt', 'lbl', text-classification needs {"),
        ("", "holds no records"),
    ):
        data.write_text(content, "utf-8")
        line = fails(1, "adapt", classifier, "--data", data, "--budget", "1GiB", "-o", tmp_path / "out")
        assert message in line


def test_records_from_standard_input(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as from the file, for predictions and an update; a resumed one needs them once more."""
    lines = data.read_text(encoding="utf-8")
    for command in (
        ("predict", classifier, "--json"),
        ("adapt", classifier, "--budget", "4GiB", "-o", tmp_path / "out", *FAST, "--json"),
    ):
        piped, told = run(*command, "--data", "-", stdin=lines), run(*command, "--data", data)
        assert piped.exit_code == told.exit_code == 0, piped.output
        results = [json.loads(result.stdout) for result in (piped, told)]
        names = ("records", "losses", "held_out_after")
        assert [results[0].get(name) for name in names] == [results[1].get(name) for name in names]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    adapt = ("adapt", classifier, "--data", "-", "--budget", "4GiB", "-o", tmp_path / "new", *FAST)
    with monkeypatch.context() as patch:
        patch.setattr("edgepeft.cli.adapt._Steps.done", stop)
        assert run(*adapt, stdin=lines).exit_code == 130
    again = run(*adapt, "--resume", stdin="".join(lines.splitlines(keepends=True)[1:]))
    assert again.exit_code == 2
    assert "new.checkpoint: was made with data" in again.stderr
    assert "(from standard input: once more all of those that it was given before)" in again.stderr
    assert "holds no records" in run(*adapt, "--resume", stdin="").stderr
    report = json.loads(run(*adapt, "--resume", "--json", stdin=lines).stdout)
    assert report["resumed_from_step"] == 1
    assert report["losses"] == results[0]["losses"]


def test_a_checkpoint_that_is_not_resumed_is_mentioned(classifier: Path, data: Path, tmp_path: Path) -> None:
    """Since the update overwrites it."""
    (tmp_path / "out.checkpoint").write_bytes(b"")
    result = run("adapt", classifier, "--data", data, "--budget", "4GiB", "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 0
    note = f"note: {tmp_path / 'out.checkpoint'} is of an update that was not finished: --resume would go on"
    assert result.stderr.startswith(note)


def test_a_folder_named_like_an_adapter(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `adapt -o my-adapter` has written is not in the bundle: its path is wanted."""
    monkeypatch.chdir(tmp_path)
    save_adapter(tiny.adapter(trained=True), tmp_path / "my-adapter")
    line = fails(1, "predict", classifier, "--data", data, "--adapter", "my-adapter")
    assert "has no adapter 'my-adapter', but a folder of that name is here: write ./my-adapter" in line
    assert run("predict", classifier, "--data", data, "--adapter", "./my-adapter").exit_code == 0
    (tmp_path / "empty").mkdir()
    line = fails(1, "predict", classifier, "--data", data, "--adapter", "./empty")
    assert "empty: holds no adapter_config.json; a PEFT adapter is a folder with that" in line


def test_an_output_that_may_not_be_written(
    classifier: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is refused before any work; what root may do, the system is not asked."""
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    line = fails(2, "adapt", classifier, "--data", data, "--budget", "4GiB", "-o", tmp_path / "new" / "out")
    assert f"out: cannot be written, {tmp_path} may not be written to: give another path" in line


def test_an_untrained_adapter_from_outside(classifier: Path, data: Path, tmp_path: Path) -> None:
    """It loads and does nothing, which is an error."""
    save_adapter(tiny.adapter(), tmp_path / "untrained")
    line = fails(1, "predict", classifier, "--data", data, "--adapter", tmp_path / "untrained")
    assert "has no effect" in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        (["mine"], "mine"),
        (["./a=b/c"], None),
        (["mine=1"], {"mine": 1.0}),
        (["mine=0.7", "other=0.3"], {"mine": 0.7, "other": 0.3}),
        (["mine", "other=-2e-1"], {"mine": 1.0, "other": -0.2}),
    ],
)
def test_adapters_and_weights_on_the_command_line(values: list[str], expected: Any) -> None:
    """A single name stays a name; the weight stands after the last equals sign."""
    if values == ["./a=b/c"]:
        with pytest.raises(UsageError, match="'b/c' is not a weight"):
            adapter_spec(values)
        assert adapter_spec(["./a=b/c=1"]) == {"./a=b/c": 1.0}
    else:
        assert adapter_spec(values) == expected


@pytest.mark.parametrize("values", [["a=x"], ["=1"], ["a=nan"], ["a=inf"], ["a", "a"]])
def test_weights_that_are_none(values: list[str]) -> None:
    """Or names given twice."""
    with pytest.raises(UsageError, match="--adapter"):
        adapter_spec(values)
