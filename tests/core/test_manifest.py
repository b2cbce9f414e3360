"""manifest.json: what is written comes back, and what contradicts itself is refused before it is used."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from edgepeft.bundle.manifest import FORMAT_VERSION, Manifest
from edgepeft.bundle.serialization import manifest_from_json, manifest_to_json
from edgepeft.bundle.validation import is_adapter_name
from edgepeft.errors import BundleError

from ..runtime import tiny

Data = dict[str, Any]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of a tiny bundle."""
    return (tiny.write_bundle(tmp_path_factory.mktemp("m") / "b") / "manifest.json").read_text()


def test_a_manifest_comes_back_equal(text: str) -> None:
    """Through dataclasses and JSON twice."""
    manifest = manifest_from_json(text)
    assert isinstance(manifest, Manifest)
    assert manifest_from_json(manifest_to_json(manifest).encode()) == manifest


def test_a_newer_format_is_refused_before_anything_else() -> None:
    """Even if its fields have changed altogether."""
    with pytest.raises(
        BundleError, match=rf"x\.json: written by a newer edgepeft \(format {FORMAT_VERSION + 1}"
    ):
        manifest_from_json(json.dumps({"format_version": FORMAT_VERSION + 1, "new": []}), "x.json")


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"format_version": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000],
)
def test_what_is_no_manifest(broken: bytes) -> None:
    """Truncated, not JSON, not an object, a duplicated key, nested for ever."""
    with pytest.raises(BundleError, match=r"^here: "):
        manifest_from_json(broken, "here")


def test_a_manifest_of_before_names_no_base(text: str) -> None:
    """The field is optional, so that bundles which older versions wrote stay readable."""
    data = json.loads(text)
    del data["base"]
    assert manifest_from_json(json.dumps(data)).base is None


def put(*path: str | int, value: Any) -> Callable[[Data], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is KeyError:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


IMAGES = {
    "resample": "bilinear",
    "rescale_factor": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "height": 8,
    "width": 8,
}
SLOT, WEIGHT, GRAPH = ("slots", 0), ("weights", "dense"), ("graphs", "inference")

A_TENSOR, HEAD_TENSOR = (*SLOT, "tensors", 0), ("slots", 1, "tensors", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", value=True), "format_version is True"),
        (put("format_version", value=0), "format_version is 0"),
        (put("task", value=KeyError), "lacks the field 'task'"),
        (put("surprise", value=1), "unknown field 'surprise'"),
        (put("task", value=3), r"manifest\.task is 3, expected str"),
        (put("task", value="poetry"), "task is 'poetry'"),
        (put("base", value="0" * 63), "base is '0"),
        (put("model", value=[]), r"manifest\.model is \[\], expected an object"),
        (put("model", "max_length", value=0), "max_length is 0"),
        (put("model", "min_length", value=2**20), "min_length is 1048576, expected 1 to"),
        (put("model", "decoder_start_token_id", value=10**6), "decoder_start_token_id is 1000000, the vocab"),
        (put("model", "problem_type", value="ranking"), "problem_type is 'ranking', expected one of"),
        (put("model", "max_length", value=1.5), "max_length is 1.5, expected int"),
        (put("model", "max_length", value=2**60), "max_length is"),
        (put("model", "vocab_size", value="many"), "vocab_size is 'many'"),
        (put("model", "pad_token_id", value=99), "pad_token_id is 99"),
        (put("model", "pad_token_id", value=1.0), "expected int or null"),
        (put("model", "labels", value=["a", "a"]), "a label twice"),
        (put("model", "labels", value=[]), "no labels"),
        (put("model", "labels", value={}), "expected a list"),
        (put("model", "mask_token_id", value=99), "mask_token_id is 99"),
        (put("model", "default_prompt", value="query"), "default_prompt is 'query', which is not among"),
        (put("model", "prompts", value={"query": 1}), "expected str"),
        (put("image_preprocessing", value=IMAGES), r"makes \[3, 8, 8\], the inference graph takes \[\]"),
        (
            put("image_preprocessing", value=IMAGES | {"height": 2**20}),
            "height is 1048576, expected 1 to 4096",
        ),
        (put("image_preprocessing", value=IMAGES | {"shortest_edge": 0}), "shortest_edge is 0"),
        (put("image_preprocessing", value=IMAGES | {"resample": "box"}), "resample is 'box'"),
        (put("image_preprocessing", value=IMAGES | {"std": [0, 1, 1]}), "has unusable factors"),
        (put("audio_preprocessing", value={"sampling_rate": 0, "normalize": True}), "sampling_rate is 0"),
        (put("quantization", "bits", value=3), "bits is 3"),
        (put("files", value=[]), "expected an object"),
        (put("files", "weights.bin", "nbytes", value=-1), "has -1 B"),
        (put("files", "weights.bin", "sha256", value="zz"), "sha256 'zz'"),
        (put("files", "manifest.json", value={"nbytes": 1, "sha256": "0" * 64}), "its own hash"),
        (put("weights_file", value="other.bin"), "'other.bin' is not in files"),
        (put(*GRAPH, "file", value="graphs/none.onnx"), "which is not in files"),
        (put(*GRAPH, "inputs", 0, "dtype", value="object"), "dtype 'object'"),
        (put(*GRAPH, "inputs", 0, "shape", value=[-1]), r"shape \[-1\]"),
        (put(*GRAPH, "outputs", 0, "shape", 0, value=2**53), r"shape \[9007199254740992,"),
        (put(*GRAPH, "inputs", 0, "shape", value=[1.5]), "expected int or str"),
        (put(*GRAPH, "inputs", 0, "name", value="attention_mask"), "an input twice"),
        (put("graphs", "inference", value=KeyError), "no inference graph"),
        (put(*WEIGHT, "offset", value=1), "multiple of 64"),
        (put(*WEIGHT, "offset", value=-4096), "begins at byte -4096"),
        (put(*WEIGHT, "offset", value=2**40), "the file has"),
        (put(*WEIGHT, "nbytes", value=8), "needs 256 B, its entry says 8 B"),
        (put(*WEIGHT, "shape", value=[2**26, 2**26, 2**26]), "needs"),
        (put(*WEIGHT, "dtype", value="O"), "dtype 'O'"),
        (put(*SLOT, "technique", value="magic"), "technique 'magic', this edgepeft knows adalora, dora, "),
        (put(*SLOT, "technique", value="whole"), "has 3 tensors, expected 1"),
        (put(*SLOT, "site", value="parameter"), "site 'parameter', expected 'linear'"),
        (put(*SLOT, "settings", value={"x": 1}), r"settings \{'x': 1\}, expected \{\}"),
        (put(*SLOT, "settings", value={"x": []}), "expected bool or int or float or str"),
        (put(*SLOT, "tensors", value=[]), "which are no LoRA's"),
        (put(*A_TENSOR, "shape", 0, value=0), "0 -> 8"),
        (put(*A_TENSOR, "shape", 0, value=-1), r"shape \[-1, 'size'\]"),
        (put(*A_TENSOR, "shape", 1, value="rank"), r"shape \[8, 'rank'\]"),
        (put(*A_TENSOR, "shape", 1, value=4), r"\[8, 4\] and 'empty' where no adapter is"),
        (put(*A_TENSOR, "shape", value=["size", 8]), "no LoRA's"),
        (put(*A_TENSOR, "name", value="C"), "no LoRA's"),
        (put(*A_TENSOR, "key", value=None), "has key None for A, expected 'base_model.model.encoder.dense"),
        (put(*A_TENSOR, "transposed", value=False), "has transposed False for A, expected True"),
        (put(*A_TENSOR, "trains", value=False), "policy.trainable|has trains False for A"),
        (put(*A_TENSOR, "neutral", value="zeros"), "'zeros' where no adapter is"),
        (put(*A_TENSOR, "neutral", value="dense"), "its default is"),
        (put(*SLOT, "tensors", 2, "transposed", value=True), "is transposed and has no 2 axes"),
        (put(*SLOT, "tensors", 2, "trains", value=True), "has trains True for scaling"),
        (put(*SLOT, "activation_axes", value=1), "activation_axes is 1"),
        (put(*A_TENSOR, "input", value="nothing"), "no input 'nothing'"),
        (put(*A_TENSOR, "input", value=tiny.B), "belongs to two slots"),
        (put(*HEAD_TENSOR, "neutral", value="nothing"), "not among the weights"),
        (put(*HEAD_TENSOR, "neutral", value="dense"), "its default is"),
        (put(*HEAD_TENSOR, "neutral", value="ones"), "with the default 'ones', expected sizes and a weight"),
        (put(*HEAD_TENSOR, "shape", value=[3, "size"]), "its default is"),
        (put("slots", 1, "activation_axes", value=2), "activation_axes 2, expected 0"),
        (put(*HEAD_TENSOR, "input", value=tiny.A), "belongs to two slots"),
        (
            put(*HEAD_TENSOR, "input", value="attention_mask"),
            "has input 'attention_mask' for weight, expected",
        ),
        (put("adapters", value=["mine", "mine"]), "listed twice"),
        (put("adapters", value=["other"]), "'adapters/other/adapter_config.json' is not in files"),
        (put("adapters", value=["../mine"]), "adapter name '../mine' is not usable"),
        (put("policy", "trainable", value=["labels"]), "'labels' is no input of a slot"),
        (put("policy", "max_steps", value=0), "max_steps is 0"),
        (put("policy", "max_relative_change", value=-1), "max_relative_change is -1"),
        (put("strategies", 0, "graph", value="gone"), "needs the graph 'gone'"),
        (put("strategies", 0, "graph", value="inference"), "no gradient of"),
        (put("strategies", 0, "exact", value=1), "exact is 1, expected bool"),
        (put("inference_memory", "session_bytes", value=-1), "session_bytes is -1"),
        (put("inference_memory", "arena_gaps", value=-0.5), "arena_gaps is -0.5"),
        (put("inference_memory", "peaks", 0, 0, "bytes", value=-1), "memory term"),
        (put("inference_memory", "peaks", 0, 0, "seq_power", value=99), "memory term"),
    ],
)
def test_a_manifest_that_contradicts_itself(text: str, change: Callable[[Data], None], message: str) -> None:
    """Types, ranges, sizes, offsets and names; the message names the field."""
    data = json.loads(text)
    change(data)
    with pytest.raises(BundleError, match=message):
        manifest_from_json(json.dumps(data))


PATHS = [
    "/etc/passwd",
    "../secret",
    "graphs/../../secret",
    "graphs/./x",
    "graphs//x",
    "",
    ".",
    "C:\\x",
    "c:/x",
    "a\\..\\b",
    "a\0b",
    "a\nb",
    "x" * 300,
    "graphs/",
    "graphs/nul",
    "graphs/Con.onnx",
    "lpt1/x",
    "graphs/COM¹.x",
    "graphs/x.",
    "graphs /x",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_leave_the_bundle_are_refused(text: str, path: str) -> None:
    """Absolute, upwards, on a drive, with a control character, a device of Windows or another name there."""
    data = json.loads(text)
    data["files"][path] = {"nbytes": 1, "sha256": "0" * 64}
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        manifest_from_json(json.dumps(data))
    data = json.loads(text)
    data["graphs"]["inference"]["file"] = path
    with pytest.raises(BundleError, match="not in files"):
        manifest_from_json(json.dumps(data))


def test_names_that_some_systems_do_not_tell_apart(text: str) -> None:
    """Windows and macOS have one file for two cases of letters."""
    data = json.loads(text)
    data["files"]["Weights.bin"] = data["files"]["weights.bin"]
    with pytest.raises(BundleError, match="a path twice but for the case of its letters"):
        manifest_from_json(json.dumps(data))
    data = json.loads(text)
    data["adapters"] = ["mine", "Mine"]
    with pytest.raises(BundleError, match="an adapter is listed twice"):
        manifest_from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "usable"),
    [("mine", True), ("console", True), ("com10", True), ("nul", False), ("AUX.v2", False), ("mine.", False)],
)
def test_names_of_adapters_are_folders_on_every_system(name: str, usable: bool) -> None:
    """Whatever the system that they are named on."""
    assert is_adapter_name(name) == usable


def test_nothing_is_written_that_could_not_be_read(text: str) -> None:
    """The exporter meets the same checks."""
    import dataclasses

    manifest = dataclasses.replace(manifest_from_json(text), task="poetry")
    with pytest.raises(BundleError, match="poetry"):
        manifest_to_json(manifest)


def test_every_field_survives_being_null(text: str) -> None:
    """Whatever is put in the place of any value, the answer is a BundleError and never another exception."""

    def places(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
        items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        return [path] * bool(path) + [place for key, value in items for place in places(value, (*path, key))]

    for place in places(json.loads(text)):
        for value in (None, -1, "x", [], {}, [[]], 1e300, True):
            data = json.loads(text)
            put(*place, value=value)(data)
            try:
                manifest_from_json(json.dumps(data))
            except BundleError:
                continue
