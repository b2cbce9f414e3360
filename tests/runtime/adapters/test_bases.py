"""Adapters that say they were trained on another base of the same shape."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import edgepeft
from edgepeft import cli
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.errors import AdapterError
from edgepeft.runtime.model import Model

from .. import tiny

OURS, THEIRS = "a" * 64, "b" * 64
IDS = {"input_ids": [[1, 2, 3]]}
REFUSED = r"was trained on base 'bbbbbbbbbbbb', this one is 'aaaaaaaaaaaa'.*--force \(in Python force=True\)"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def saved(folder: Path, base: str | None, task: str = "text-classification") -> Path:
    """A trained adapter that says it is of this base; None: nothing, as PEFT writes it."""
    save_adapter(replace(tiny.adapter(seed=5, task=task, trained=True), base=base), folder)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.write_bundle(tmp_path / "tiny.edge", tokenizer=tiny.word_tokenizer(), base=OURS)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return saved(tmp_path / "theirs", THEIRS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in tiny.records()))
    return path


CALLS: dict[str, Callable[[Model, Path, Path], object]] = {
    "forward": lambda model, adapter, _: model.forward(IDS, adapter=adapter),
    "rows": lambda model, adapter, _: model.forward(IDS, adapter=[adapter]),
    "mixture": lambda model, adapter, _: model.forward(IDS, adapter={str(adapter): 0.5}),
    "load": lambda model, adapter, _: model.load_adapter("theirs", adapter),
    "gradients": lambda model, adapter, _: model.loss_and_gradients({**IDS, "labels": [0]}, adapter),
    "adapt": lambda model, adapter, output: model.adapt(
        tiny.records(), output, adapter=str(adapter), steps=1
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_adapter_of_another_base_is_refused(bundle: Path, theirs: Path, tmp_path: Path, call: str) -> None:
    """Wherever one is activated or started from, unless that is meant."""
    with edgepeft.load(bundle) as model, pytest.raises(AdapterError, match=REFUSED):
        CALLS[call](model, theirs, tmp_path / "out")
    with edgepeft.load(bundle, force=True) as model:
        CALLS[call](model, theirs, tmp_path / "out")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("of_bundle", "of_adapter"), [(OURS, OURS), (OURS, None), (None, THEIRS), (None, None)]
)
def test_what_records_no_base_is_taken(
    tmp_path: Path, call: str, of_bundle: str | None, of_adapter: str | None
) -> None:
    """PEFT's own adapters, and bundles that an older edgepeft wrote."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", base=of_bundle)
    adapter = saved(tmp_path / "adapter", of_adapter)
    with edgepeft.load(bundle) as model:
        CALLS[call](model, adapter, tmp_path / "out")


@pytest.mark.parametrize("base", [OURS, None])
@pytest.mark.parametrize("options", [{"adapter": "theirs"}, {"adapter": "mine"}, {"rank": 2}])
def test_what_is_trained_here_says_so(
    tmp_path: Path, base: str | None, options: dict[str, str | int]
) -> None:
    """Whatever it started from; on a bundle that does not know its base, nothing is said."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", base=base)
    saved(bundle / "adapters" / "theirs", THEIRS)
    with edgepeft.load(bundle, force=True) as model:
        model.adapt(tiny.records(), tmp_path / "out", steps=2, learning_rate=0.02, **options)
    assert load_adapter(tmp_path / "out").base == base


@pytest.mark.parametrize("command", ["predict", "adapt", "plan"])
def test_the_commands_take_it_by_force(
    bundle: Path, theirs: Path, data: Path, tmp_path: Path, command: str
) -> None:
    """One line and exit code 1 without; nothing is written."""
    more: dict[str, tuple[object, ...]] = {
        "predict": ("--data", data),
        "adapt": ("--data", data, "--budget", "4GiB", "-o", tmp_path / "out", "--steps", "2"),
        "plan": ("--budget", "4GiB"),
    }
    arguments = (command, bundle, "--adapter", theirs, *more[command])
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {theirs}: was trained on base 'bbbbbbbbbbbb'")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--force").exit_code == 0


def test_generate_takes_it_by_force(tmp_path: Path) -> None:
    """A language model's."""
    bundle = tiny.write_bundle(
        tmp_path / "tiny.edge", "text-generation", tokenizer=tiny.word_tokenizer(), base=OURS
    )
    adapter = saved(tmp_path / "theirs", THEIRS, "text-generation")
    arguments = ("generate", bundle, "--prompt", "w1 w2", "--adapter", adapter, "--max-new-tokens", "2")
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "was trained on base 'bbbbbbbbbbbb'" in refused.stderr
    assert run(*arguments, "--force").exit_code == 0


def test_an_adapter_that_was_added_by_force_needs_it_no_more(bundle: Path, theirs: Path, data: Path) -> None:
    """The manifest lists it: whoever added it has said that it is meant. It still says what it is."""
    before = (bundle / "manifest.json").read_bytes()
    refused = run("adapter", "add", bundle, f"x={theirs}")
    assert refused.exit_code == 1
    assert "was trained on base 'bbbbbbbbbbbb'" in refused.stderr
    assert (bundle / "manifest.json").read_bytes() == before
    assert run("adapter", "add", bundle, f"x={theirs}", "--force").exit_code == 0
    assert run("predict", bundle, "--data", data, "--adapter", "x").exit_code == 0
    listed = json.loads(run("adapter", "list", bundle, "--json").stdout)
    assert [item["base"] for item in listed] == [None, THEIRS]


def test_an_adapter_that_was_dropped_in_is_looked_at(bundle: Path, theirs: Path, data: Path) -> None:
    """The list and the inspection go on and say so; it can be taken out again."""
    shutil.copytree(theirs, bundle / "adapters" / "x")
    assert run("predict", bundle, "--data", data, "--adapter", "x").exit_code == 1
    assert run("predict", bundle, "--data", data, "--adapter", "x", "--force").exit_code == 0
    listed = run("adapter", "list", bundle).stdout
    assert "x  cannot be used: " in listed
    assert "was trained on base 'bbbbbbbbbbbb'" in listed
    shown = run("inspect", bundle).stdout
    assert f"base      {OURS[:12]}\n" in shown
    assert shown.endswith("parameters, trained on another base\n")
    assert shown.count("trained on another base") == 1
    assert run("adapter", "export", bundle, "x", "-o", bundle.parent / "x").exit_code == 1
    assert run("adapter", "export", bundle, "x", "-o", bundle.parent / "x", "--force").exit_code == 0
    assert load_adapter(bundle.parent / "x").base == THEIRS


def test_adding_and_exporting_keep_what_an_adapter_says(bundle: Path, tmp_path: Path) -> None:
    """Also in 16 bits."""
    ours = saved(tmp_path / "ours", OURS)
    assert run("adapter", "add", bundle, f"half={ours}", "--dtype", "float16").exit_code == 0
    assert run("adapter", "add", bundle, f"whole={ours}").exit_code == 0
    for name, dtype in (("half", "float32"), ("whole", "float16")):
        out = tmp_path / name
        assert run("adapter", "export", bundle, name, "-o", out, "--dtype", dtype).exit_code == 0
        assert load_adapter(out).base == load_adapter(bundle / "adapters" / name).base == OURS
