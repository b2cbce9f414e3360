"""Opening bundles that are damaged or hostile."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgepeft.adapters import save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, BundleError

from ..runtime import tiny


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return tiny.write_bundle(tmp_path / "tiny.edge")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    shutil.move(path, path.parent.parent / f"{path.name}.real")
    path.symlink_to(path.parent.parent / f"{path.name}.real")


def second_name(path: Path) -> None:
    os.link(path, path.parents[2] / "second-name")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["graphs/train.onnx", "weights.bin", "adapters/mine/adapter_config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "its sha256 is .*copy the bundle again"),
        (truncate, "has .* B, its manifest says .* truncated"),
        (remove, "is missing"),
        (link, "is a symbolic link"),
        (second_name, "2 names on its disk"),
        (pipe, "is not a plain file"),
        (folder, "is not a plain file"),
    ],
)
def test_a_damaged_file_is_named(
    bundle: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    """One error for every way, with the file and the remedy, and without waiting on a pipe."""
    damage(bundle / name)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(bundle)
    assert str(bundle / name) in str(caught.value)


def test_a_linked_folder_is_refused(bundle: Path) -> None:
    """The link may be anywhere on the way."""
    shutil.move(bundle / "graphs", bundle.parent / "graphs")
    (bundle / "graphs").symlink_to(bundle.parent / "graphs")
    with pytest.raises(BundleError, match="graphs: is a symbolic link"):
        open_bundle(bundle)


def test_a_junction_is_a_link(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may make one on Windows, and there it is a folder to `stat`."""
    lstat = Path.lstat

    def on_windows(self: Path) -> os.stat_result | SimpleNamespace:
        status = lstat(self)
        if self != bundle / "graphs":
            return status
        return SimpleNamespace(st_mode=status.st_mode, st_nlink=1, st_reparse_tag=0xA0000003)

    monkeypatch.setattr(Path, "lstat", on_windows)
    with pytest.raises(BundleError, match="graphs: is a symbolic link or a junction"):
        open_bundle(bundle)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    """Nothing, a file, a folder without a manifest, a manifest that is a link."""
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="expected a bundle's folder"):
        open_bundle(tmp_path / "file")
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        open_bundle(tmp_path)
    (tmp_path / "manifest.json").symlink_to(tmp_path / "file")
    with pytest.raises(BundleError, match="symbolic link"):
        open_bundle(tmp_path)


def test_what_is_no_bundle_says_what_it_is_and_what_to_do(bundle: Path) -> None:
    """A name mistyped, a part of a bundle, a model, an adapter, an ONNX file."""
    folder = bundle.parent
    near = bundle.with_name(bundle.name[:-1])
    with pytest.raises(BundleError, match=rf"no such bundle: did you mean {bundle}\?$"):
        open_bundle(near)
    with pytest.raises(BundleError, match=r"no such bundle$"):
        open_bundle(folder / "nowhere" / bundle.name)
    with pytest.raises(BundleError, match=f"is a part of a bundle: give {bundle}$"):
        open_bundle(bundle / "graphs")
    for name, file, message in (
        ("model", "config.json", r"is a model, no bundle yet: edgepeft export .*model -o NAME\.edge"),
        (
            "adapter",
            "adapter_config.json",
            "is a PEFT adapter: give a bundle, and the adapter",
        ),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
        with pytest.raises(BundleError, match=message):
            open_bundle(folder / name)
    (folder / "model.onnx").write_text("")
    with pytest.raises(BundleError, match=r"is a file, .*: edgepeft export .*model\.onnx -o NAME\.edge"):
        open_bundle(folder / "model.onnx")


def test_a_graph_that_changes_after_opening_is_not_run(bundle: Path) -> None:
    """The bytes that are handed over are the ones that were hashed."""
    opened = open_bundle(bundle)
    flip(bundle / "graphs" / "inference.onnx")
    with pytest.raises(BundleError, match="sha256"):
        opened.graph_bytes("inference")
    with pytest.raises(BundleError, match="has no graph 'nonsense', only inference"):
        opened.graph_bytes("nonsense")


def test_a_dropped_adapter_just_loads(bundle: Path) -> None:
    """It needs no entry in the manifest."""
    save_adapter(tiny.adapter(rank=3, trained=True), bundle / "adapters" / "dropped")
    (bundle / "adapters" / "notes.txt").write_text("not an adapter")
    (bundle / "adapters" / "empty").mkdir()
    opened = open_bundle(bundle)
    assert opened.adapter_names() == ("mine", "dropped")
    assert opened.adapter("dropped").rank(tiny.MODULE) == 3


@pytest.mark.parametrize("name", ["none", "../mine", "/etc", "", "a/b"])
def test_an_unknown_adapter_is_named(bundle: Path, name: str) -> None:
    """With those that exist."""
    with pytest.raises(AdapterError, match=r"has no adapter .*\(it has mine\)"):
        open_bundle(bundle).adapter(name)


def test_a_dropped_adapter_cannot_be_a_link(bundle: Path, tmp_path: Path) -> None:
    """Not out of the bundle, and not by a file inside a folder."""
    save_adapter(tiny.adapter(trained=True), tmp_path / "outside")
    (bundle / "adapters" / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="linked: is a symbolic link"):
        open_bundle(bundle).adapter("linked")


def test_an_adapter_of_another_base_is_refused(bundle: Path) -> None:
    """The first module that does not fit is named."""
    other = tiny.adapter(trained=True)
    tensors = {key.replace("encoder.dense", "decoder.dense"): value for key, value in other.tensors.items()}
    save_adapter(other.with_tensors(tensors, "other"), bundle / "adapters" / "other")
    with pytest.raises(AdapterError, match=r"module decoder\.dense takes no LoRA in this bundle"):
        open_bundle(bundle).adapter("other")


def test_a_file_the_manifest_does_not_list_is_not_read(bundle: Path) -> None:
    """Such as a tokenizer that was added later."""
    (bundle / "tokenizer.json").write_text(json.dumps({}))
    assert "tokenizer.json" not in open_bundle(bundle).manifest.files
