"""Bundles whose hashes are right and whose content is not: one hand wrote the manifest and the rest."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgepeft
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.serialization import manifest_from_json
from edgepeft.bundle.writer import hash_folder, write_manifest
from edgepeft.errors import BundleError, EdgePeftError

from . import tiny

BATCH = {"input_ids": [[1, 2, 3]]}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one's own, with a secret beside it."""
    (tmp_path / "secret.bin").write_bytes(b"s" * 4096)
    return tiny.write_bundle(tmp_path / "tiny.edge", tokenizer=tiny.word_tokenizer())


def rehash(bundle: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """Make the manifest vouch for whatever the folder holds now."""
    manifest = manifest_from_json((bundle / "manifest.json").read_text())
    write_manifest(change(dataclasses.replace(manifest, files=hash_folder(bundle))), bundle)


def edit(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the inference graph."""
    path = bundle / "graphs" / "inference.onnx"
    model = onnx.ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    rehash(bundle)


def external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value

    return change


@pytest.mark.parametrize("kind", ["parent", "absolute", "nested", "missing", "manifest"])
def test_external_data_stays_inside_the_bundle(bundle: Path, kind: str) -> None:
    """Upwards, absolute, through a folder, not there, and not a weight file."""
    location = {
        "parent": "../secret.bin",
        "absolute": str(bundle.parent / "secret.bin"),
        "nested": "graphs/../../secret.bin",
        "missing": "other.bin",
        "manifest": "manifest.json",
    }[kind]
    edit(bundle, external("location", location))
    if kind == "manifest":  # inside the bundle, so there is nothing to keep from it
        edit(bundle, external("offset", str(2**40)))
    with (
        edgepeft.load(bundle) as model,
        pytest.raises(BundleError, match=r"graph 'inference': onnxruntime .* refuses"),
    ):
        model.forward(BATCH)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", str(2**40)), ("offset", "-4096"), ("length", str(2**40))]
)
def test_external_data_stays_inside_its_file(bundle: Path, key: str, value: str) -> None:
    """Offsets and lengths beyond the end, and before the beginning."""
    edit(bundle, external(key, value))
    with edgepeft.load(bundle) as model, pytest.raises(BundleError, match="refuses"):
        model.forward(BATCH)


def garbage(bundle: Path) -> None:
    (bundle / "graphs" / "inference.onnx").write_bytes(b"\x08\xff" * 1000)
    rehash(bundle)


def empty(bundle: Path) -> None:
    (bundle / "graphs" / "inference.onnx").write_bytes(b"")
    rehash(bundle)


def unknown_operator(bundle: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "RunMyCode"

    edit(bundle, change)


def another_graph(bundle: Path) -> None:
    (bundle / "graphs" / "inference.onnx").write_bytes((bundle / "graphs" / "train.onnx").read_bytes())
    rehash(bundle)


def swapped_roles(bundle: Path) -> None:
    rehash(
        bundle,
        lambda manifest: dataclasses.replace(
            manifest,
            graphs={
                **manifest.graphs,
                "inference": dataclasses.replace(manifest.graphs["inference"], file="weights.bin"),
            },
        ),
    )


@pytest.mark.parametrize("damage", [garbage, empty, unknown_operator, another_graph, swapped_roles])
def test_a_graph_that_is_none_is_a_bundle_error(bundle: Path, damage: Callable[[Path], None]) -> None:
    """Bytes, an operator of nowhere, inputs that are not the manifest's, a file of another kind."""
    damage(bundle)
    with edgepeft.load(bundle) as model, pytest.raises(BundleError, match="graph 'inference'"):
        model.forward(BATCH)


def test_a_graph_that_fails_while_it_runs(bundle: Path) -> None:
    """onnxruntime's exception becomes one of ours, in one line."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "Gather":
                node.input[0], node.input[1] = "dense", "input_ids"

    edit(bundle, change)
    with edgepeft.load(bundle) as model:
        with pytest.raises(EdgePeftError, match="graph 'inference': failed: ") as caught:
            model.forward({"input_ids": [[20, 21]]})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", '{"model": {}}', "\0" * 100])
def test_a_tokenizer_that_is_none(bundle: Path, content: str) -> None:
    """It is not needed until there is text."""
    (bundle / "tokenizer.json").write_text(content)
    rehash(bundle)
    with edgepeft.load(bundle) as model:
        model.predict([{"input_ids": [1, 2]}])
        with pytest.raises(BundleError, match=r"tokenizer\.json: tokenizers .* cannot read it"):
            model.predict([{"text": "w1"}])


def with_weight(bundle: Path, name: str, value: float) -> None:
    """Every value of a weight is this."""
    weight = manifest_from_json((bundle / "manifest.json").read_text()).weights[name]
    data = bytearray((bundle / "weights.bin").read_bytes())
    values = np.full(weight.nbytes // 4, value, np.float32).tobytes()
    data[weight.offset : weight.offset + weight.nbytes] = values
    (bundle / "weights.bin").write_bytes(data)
    rehash(bundle)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction", "text-generation"])
def test_what_is_no_number_is_not_given_out(tmp_path: Path, task: str, value: float) -> None:
    """Weights that are none: no probability, no embedding, no token."""
    bundle = tiny.write_bundle(tmp_path / "b", task, tokenizer=tiny.word_tokenizer())
    with_weight(bundle, "embedding", value)
    with_weight(bundle, "unembedding", value)
    calls: list[Callable[[Any], Any]] = {
        "text-classification": [lambda model: model.predict([{"text": "w1 w2"}])],
        "feature-extraction": [
            lambda model: model.embed(["w1"]),
            lambda model: model.predict([{"text": "w1"}]),
        ],
        "text-generation": [
            lambda model: model.generate("w1", max_new_tokens=2),
            lambda model: model.generate("w1", max_new_tokens=2, temperature=1.0, seed=0),
        ],
    }[task]
    with edgepeft.load(bundle) as model:
        for call in calls:
            with pytest.raises(EdgePeftError, match=r"no finite numbers|are not finite numbers.*damaged"):
                call(model)


def test_weights_that_are_no_numbers_teach_nothing(bundle: Path, tmp_path: Path) -> None:
    """An update ends, and no adapter is written."""
    with_weight(bundle, "dense", np.nan)
    with edgepeft.load(bundle) as model, pytest.raises(EdgePeftError):
        model.adapt(tiny.records(120), tmp_path / "out", steps=12, batch_size=4)
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_shape(bundle: Path) -> None:
    """A graph may give what it does not declare."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "logits_"
        model.graph.node.append(onnx.helper.make_node("ReduceSum", ["logits_"], ["logits"], keepdims=0))
        model.graph.output[0].type.tensor_type.ClearField("shape")

    edit(bundle, change)
    with (
        edgepeft.load(bundle) as model,
        pytest.raises(EdgePeftError, match=r"'inference': failed: .*'logits'"),
    ):
        model.predict([{"input_ids": [1, 2]}])


def test_a_tokenizer_that_fails_at_a_text(bundle: Path) -> None:
    """It has been read, and has no token for what it does not know."""
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "nothing"
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(bundle)
    with (
        edgepeft.load(bundle) as model,
        pytest.raises(BundleError, match=r"tokenizer\.json: the tokenizer fails"),
    ):
        model.predict([{"text": "unheard of"}])


@pytest.mark.parametrize("number", [tiny.VOCAB, 2**31, 2**32 - 1])
def test_a_tokenizer_of_a_larger_vocabulary(bundle: Path, number: int) -> None:
    """Than the model's, and than what numbers of tokens are held in."""
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w7"] = number
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    rehash(bundle)
    with edgepeft.load(bundle) as model:
        assert model.predict([{"text": "w6"}])
        with pytest.raises(EdgePeftError, match=rf"it gives {number} for|holds token {number}"):
            model.predict([{"text": "w7"}])


def test_weights_that_are_shorter_than_the_manifest_says(bundle: Path) -> None:
    """The manifest is held against the file's real size."""
    (bundle / "weights.bin").write_bytes((bundle / "weights.bin").read_bytes()[:4096])
    with pytest.raises(BundleError, match="ends at byte"):
        rehash(bundle)
