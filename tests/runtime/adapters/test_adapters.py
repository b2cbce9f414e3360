"""Loaded adapters, batches whose rows have adapters of their own, and a bundle's adapters on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import edgepeft
from edgepeft import cli
from edgepeft.adapters import load_adapter, save_adapter, write_adapter
from edgepeft.bundle import adapter_store
from edgepeft.bundle.adapter_store import add_adapter, remove_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, BudgetError, BundleError, UsageError
from edgepeft.runtime import prediction
from edgepeft.runtime.memory.process import read_memory, release_freed_memory
from edgepeft.runtime.records import records

from .. import tiny
from ..memory.test_memory import linux

IDS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])


def saved(folder: Path, rank: int, seed: int, task: str = "feature-extraction") -> Path:
    save_adapter(tiny.adapter(rank=rank, seed=seed, task=task, trained=True), folder)
    return folder


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """Adapters of three ranks."""
    return {name: saved(tmp_path / name, rank, rank) for name, rank in (("a", 2), ("b", 5), ("c", 1))}


@pytest.mark.parametrize("task", ["feature-extraction", "text-generation"])
def test_rows_of_a_batch_have_adapters_of_their_own(
    tmp_path: Path, three: dict[str, Path], task: str
) -> None:
    """Each row is what it is when the whole batch has its adapter: activations of 2 and of 3 axes."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", task)
    rows: list[Any] = ["a", "b", None, {"a": 0.5, "c": -2.0}]
    with edgepeft.load(bundle) as model:
        for name, path in three.items():
            model.load_adapter(name, path)
        (mixed,) = model.forward({"input_ids": IDS}, adapter=rows).values()
        (same,) = model.forward({"input_ids": IDS[:2]}, adapter=["b", "b"]).values()
        for index, row in enumerate(rows):
            (alone,) = model.forward({"input_ids": IDS}, adapter=row).values()
            np.testing.assert_allclose(mixed[index], alone[index], rtol=0, atol=1e-5)
        (alone,) = model.forward({"input_ids": IDS[:3]}, adapter="b").values()
        np.testing.assert_allclose(same, alone[:2], rtol=0, atol=1e-6)
        assert np.abs(mixed[0] - model.forward({"input_ids": IDS}, "b").popitem()[1][0]).max() > 1e-3


def test_embeddings_and_predictions_take_an_adapter_a_record(encoder: Path, three: dict[str, Path]) -> None:
    """Records are run by length and come back in their order, each with its own adapter."""
    texts = ["w1 w2 w3 w4", "w5", "w6 w7", "w8 w9 w10 w11 w12"]
    names = ["a", None, "b", "c"]
    with edgepeft.load(encoder) as model:
        for name, path in three.items():
            model.load_adapter(name, path)
        together = model.embed(texts, adapter=names, batch_size=3)
        assert together.dtype == np.float32
        for text, name, row in zip(texts, names, together, strict=True):
            np.testing.assert_allclose(model.embed([text], adapter=name)[0], row, atol=1e-5)
        predicted = model.predict([{"text": text} for text in texts], adapter=names)
        np.testing.assert_allclose([item["embedding"] for item in predicted], together, atol=1e-5)
        with pytest.raises(UsageError, match="is a list of 2, the batch has 4 records"):
            model.embed(texts, adapter=["a", "b"])
        with pytest.raises(UsageError, match="is a list of 1, the batch has 4 rows"):
            model.forward({"input_ids": IDS}, adapter=["a"])


def test_a_batch_that_the_budget_cannot_hold_is_halved(tmp_path: Path) -> None:
    """The same embeddings from smaller batches; what no batch can do is refused."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    sizes: list[int] = []
    with edgepeft.load(bundle) as device:
        given = [{"input_ids": [1 + index] * (1 + index % 5)} for index in range(7)]
        expected = device.embed(given)

        def forward(batch: Any, adapter: Any) -> Any:
            if len(batch["input_ids"]) > limit:
                raise BudgetError("too large", budget_bytes=1, required_bytes=2)
            sizes.append(len(batch["input_ids"]))
            return device.forward(batch, adapter)

        examples = device._task.encode_all(records(given), 16, training=False)
        limit = 2
        got = prediction.embeddings(device._task, forward, examples, None, 7)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert max(sizes) == 2
        limit = 0
        with pytest.raises(BudgetError, match="too large"):
            prediction.embeddings(device._task, forward, examples, None, 7)


def test_rows_cannot_differ_in_what_is_replaced_whole(tmp_path: Path) -> None:
    """Two heads in one batch are refused; one head and none are two as well."""
    adapters = {
        name: tiny.adapter(rank=2, seed=seed, trained=True) for seed, name in enumerate(("one", "two"), 1)
    }
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", adapters=adapters)
    with edgepeft.load(bundle) as model:
        with pytest.raises(AdapterError, match="classifier is replaced whole"):
            model.forward({"input_ids": IDS[:2]}, adapter=["one", "two"])
        both = model.forward({"input_ids": IDS[:2]}, adapter=["one", "one"])["logits"]
        np.testing.assert_allclose(both, model.forward({"input_ids": IDS[:2]}, "one")["logits"])


def test_a_bundle_that_cannot_tell_rows_apart_says_so(tmp_path: Path, three: dict[str, Path]) -> None:
    """Windows of images are rows to a linear."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["slots"][0]["activation_axes"] = 0
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with edgepeft.load(bundle) as model, pytest.raises(AdapterError, match="mix the rows of a batch"):
        model.forward({"input_ids": IDS[:2]}, adapter=[three["a"], None])


def test_adapters_are_loaded_and_unloaded(tmp_path: Path, encoder: Path, three: dict[str, Path]) -> None:
    """By names that calls use; what is unloaded is gone, also from the session that had it."""
    with edgepeft.load(encoder) as model:
        assert model.adapters == ("mine",)
        plain = model.forward({"input_ids": IDS})["sentence_embedding"]
        model.load_adapter("a", three["a"])
        assert model.adapters == ("mine", "a")
        expected = model.forward({"input_ids": IDS}, adapter=three["a"])["sentence_embedding"]
        shutil.rmtree(three["a"])  # it is in memory
        got = model.forward({"input_ids": IDS}, adapter="a")["sentence_embedding"]
        assert np.array_equal(got, expected)
        for call, message in (
            (lambda: model.load_adapter("a", three["b"]), "is loaded already"),
            (lambda: model.load_adapter("mine", three["b"]), "has an adapter 'mine' of its own"),
            (lambda: model.load_adapter("../a", three["b"]), "is not usable"),
        ):
            with pytest.raises(UsageError, match=message):
                call()
        save_adapter(tiny.adapter(task="feature-extraction"), tmp_path / "untrained")
        with pytest.raises(AdapterError, match="has no effect"):
            model.load_adapter("none", tmp_path / "untrained")
        model.load_adapter("mine")
        model.unload_adapter("a")
        assert np.array_equal(model.forward({"input_ids": IDS})["sentence_embedding"], plain)
        with pytest.raises(AdapterError, match="has no adapter 'a'"):
            model.forward({"input_ids": IDS}, adapter="a")
        with pytest.raises(AdapterError, match="no adapter 'a' is loaded"):
            model.unload_adapter("a")


def test_a_folder_that_changed_is_read_again(encoder: Path, tmp_path: Path) -> None:
    """As text or as a Path."""
    folder = saved(tmp_path / "mine", 2, 1)
    with edgepeft.load(encoder) as model:
        for spec in (folder, str(folder)):
            first = model.forward({"input_ids": IDS}, adapter=spec)["sentence_embedding"]
            saved(folder, 2, 7)
            second = model.forward({"input_ids": IDS}, adapter=spec)["sentence_embedding"]
            assert np.abs(first - second).max() > 1e-3
            saved(folder, 2, 1)


@linux  # elsewhere malloc keeps what was freed, and fills it again
def test_loaded_adapters_cost_their_own_bytes(encoder: Path, tmp_path: Path) -> None:
    """Thirty of a mebibyte each, by the kernel's account of the process; unloaded, they are given back."""
    folder = saved(tmp_path / "large", 2**14, 1)  # A and B: 2 x 8 x 16,384 float32
    own_bytes = sum(tensor.nbytes for tensor in load_adapter(folder).tensors.values())
    with edgepeft.load(encoder) as model:
        model.load_adapter("first", folder)
        model.forward({"input_ids": IDS}, adapter="first")
        release_freed_memory()
        before = read_memory().resident_bytes
        for index in range(30):
            model.load_adapter(f"copy{index}", folder)
        release_freed_memory()
        grown = read_memory().resident_bytes - before
        assert 0.9 * 30 * own_bytes < grown < 1.15 * 30 * own_bytes
        for index in range(30):
            model.unload_adapter(f"copy{index}")
        assert read_memory().resident_bytes - before < 0.1 * 30 * own_bytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load(encoder: Path, tmp_path: Path, dtype: str) -> None:
    """As their values in float32."""
    import ml_dtypes

    adapter = tiny.adapter(rank=3, task="feature-extraction", trained=True)
    halves = {
        key: tensor.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
        for key, tensor in adapter.tensors.items()
    }
    folder = saved(tmp_path / "half", 3, 1)
    safetensors.numpy.save_file(halves, folder / "adapter_model.safetensors")
    full = adapter.with_tensors({key: value.astype(np.float32) for key, value in halves.items()}, "full")
    save_adapter(full, tmp_path / "full")
    with edgepeft.load(encoder) as model:
        model.load_adapter("half", folder)
        got = model.forward({"input_ids": IDS}, adapter="half")["sentence_embedding"]
        expected = model.forward({"input_ids": IDS}, adapter=tmp_path / "full")["sentence_embedding"]
    assert np.array_equal(got, expected)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_add_list_export_and_remove(tmp_path: Path, three: dict[str, Path]) -> None:
    """Files are copied byte for byte, the manifest lists them with their hashes, nothing is left behind."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    before = (bundle / "manifest.json").read_bytes()
    assert run("adapter", "add", bundle, f"a={three['a']}", f"b={three['b']}") == "added a\nadded b\n"
    opened = open_bundle(bundle)
    assert opened.manifest.adapters == ("mine", "a", "b")
    assert "adapters/a/adapter_model.safetensors" in opened.manifest.files
    shutil.copytree(three["c"], bundle / "adapters" / "c")
    listed = json.loads(run("adapter", "list", bundle, "--json"))
    assert [(item["name"], item["ranks"], item["in_manifest"]) for item in listed] == [
        ("mine", [2], True),
        ("a", [2], True),
        ("b", [5], True),
        ("c", [1], False),
    ]
    table = run("adapter", "list", bundle)
    assert "dropped in" in table
    assert listed[1]["sha256"][:12] in table
    run("adapter", "export", bundle, "b", "-o", tmp_path / "out")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (three["b"] / file).read_bytes()
    assert run("adapter", "remove", bundle, "a", "b", "c") == "removed a\nremoved b\nremoved c\n"
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in (bundle / "adapters").iterdir()] == ["mine"]


def test_what_float16_cannot_hold_is_not_stored_in_it(tmp_path: Path, three: dict[str, Path]) -> None:
    """Values that would become infinite, or zero; and a file that is float32 by its format."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    adapter = load_adapter(three["a"])
    for name, factor in (("large", 1e6), ("small", 1e-9)):
        scaled = {key: tensor * np.float32(factor) for key, tensor in adapter.tensors.items()}
        save_adapter(adapter.with_tensors(scaled, name), tmp_path / name)
    run("adapter", "add", bundle, f"a={three['a']}")
    for arguments, code, message in (
        (("add", f"x={tmp_path / 'large'}"), 1, "float16 holds 65504: keep it in float32"),
        (("add", f"x={tmp_path / 'small'}"), 1, "has no effect"),
        (("export", "a", "-o", tmp_path / "a.onnx_adapter"), 2, "leave out --dtype float16"),
    ):
        command, *rest = arguments
        given = ["adapter", command, bundle, *rest, "--dtype", "float16"]
        result = CliRunner().invoke(cli.main, [str(item) for item in given])
        assert result.exit_code == code, result.output
        assert message in result.stderr
    assert sorted(path.name for path in (bundle / "adapters").iterdir()) == ["a", "mine"]


def test_what_cannot_be_added_changes_nothing(tmp_path: Path, three: dict[str, Path]) -> None:
    """One line each, with a remedy."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    save_adapter(tiny.adapter(task="feature-extraction"), tmp_path / "untrained")
    saved(tmp_path / "head", 2, 1, "text-classification")
    before = (bundle / "manifest.json").read_bytes()
    for item, code, message in (
        (f"mine={three['a']}", 2, "has an adapter 'mine' already: remove it first"),
        (f"Mine={three['a']}", 2, "has an adapter 'mine' already"),  # one folder on Windows and macOS
        (f"../x={three['a']}", 2, "is not usable"),
        (f"nul={three['a']}", 2, "nothing that Windows reserves"),
        (str(three["a"]), 2, "write NAME=PATH"),
        (f"x={tmp_path / 'untrained'}", 1, "has no effect"),
        (f"x={tmp_path / 'head'}", 1, "does not let an adapter replace it"),
        (f"x={tmp_path / 'nowhere'}", 1, "no such folder"),
    ):
        result = CliRunner().invoke(cli.main, ["adapter", "add", str(bundle), item])
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in (bundle / "adapters").iterdir()] == ["mine"]
    gone = CliRunner().invoke(cli.main, ["adapter", "remove", str(bundle), "x"])
    assert gone.exit_code == 1
    assert "has no adapter 'x' (it has mine)" in gone.stderr


@pytest.mark.parametrize("at", ["write_manifest", "hash_file"])
def test_an_add_that_dies_leaves_a_bundle_that_opens(
    tmp_path: Path, three: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Its folder counts as dropped in; it can be removed and added again, or added again at once."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    adapter = load_adapter(three["a"])

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapter_store, at, dies)
        with pytest.raises(KeyboardInterrupt):
            add_adapter(open_bundle(bundle), "a", adapter, lambda folder: write_adapter(adapter, folder))
    opened = open_bundle(bundle)
    assert opened.manifest.adapters == ("mine",)
    assert opened.adapter_names() == ("mine", "a")
    other = load_adapter(three["b"])
    with pytest.raises(UsageError, match="has an adapter 'a' already"):
        add_adapter(opened, "a", other, lambda folder: write_adapter(other, folder))
    (bundle / "adapters" / "a" / "more").write_text("kept")
    opened = add_adapter(opened, "a", adapter, lambda folder: write_adapter(adapter, folder))
    assert (bundle / "adapters" / "a" / "more").exists()
    opened = remove_adapter(opened, "a")
    opened = add_adapter(opened, "a", adapter, lambda folder: write_adapter(adapter, folder))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            remove_adapter(opened, "a")
    assert open_bundle(bundle).manifest.adapters == ("mine",)
    add_adapter(open_bundle(bundle), "b", other, lambda folder: write_adapter(other, folder))
    pytest.importorskip("fcntl", reason="without locks a day has to pass")
    assert sorted(path.name for path in (bundle / "adapters").iterdir()) == ["b", "mine"]


def test_additions_at_once_are_all_there(tmp_path: Path, three: dict[str, Path]) -> None:
    """Each process has opened the bundle before another one writes."""
    pytest.importorskip("fcntl", reason="Windows has no lock between commands; docs/adapters.md says so")
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    opened = open_bundle(bundle)
    for name, path in three.items():
        adapter = load_adapter(path)
        add_adapter(opened, name, adapter, lambda folder, adapter=adapter: write_adapter(adapter, folder))
    remove_adapter(opened, "mine")
    assert open_bundle(bundle).manifest.adapters == tuple(three)
    script = "import sys, edgepeft.cli; edgepeft.cli.main(['adapter', 'add', sys.argv[1], sys.argv[2]])"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(bundle), f"{name}2={path}"])
        for name, path in three.items()
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(open_bundle(bundle).manifest.adapters) == ["a", "a2", "b", "b2", "c", "c2"]


def test_a_bundle_that_was_replaced_meanwhile_is_left_alone(tmp_path: Path, three: dict[str, Path]) -> None:
    """By one with other weights."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge", "feature-extraction")
    opened = open_bundle(bundle)
    shutil.rmtree(bundle)
    tiny.write_bundle(bundle, "text-classification")
    adapter = load_adapter(three["a"])
    with pytest.raises(BundleError, match="was replaced by another bundle meanwhile"):
        add_adapter(opened, "a", adapter, lambda folder: write_adapter(adapter, folder))
