"""The kinds of files that a stranger can hand in, and what the product does with each."""

import functools
import hashlib
import importlib
import io
import json
import shutil
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

import edgepeft
from edgepeft.adapters import save_adapter
from edgepeft.bundle.manifest import AudioPreprocessing, ImagePreprocessing
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from edgepeft.runtime.generation.prompt_cache import open_prompt_cache
from edgepeft.runtime.preprocessing import audio, images
from edgepeft.runtime.records import Record, records
from edgepeft.runtime.tasks import task_for
from edgepeft.runtime.tasks.values import read_values
from edgepeft.runtime.text.chat import ChatTemplate
from edgepeft.runtime.training.head.remembered import read_features, write_features
from edgepeft.runtime.training.report import read_report
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.state.checkpoint import Progress, is_finished, load_checkpoint, save_checkpoint
from tests.fuzz import mutate
from tests.fuzz.runner import Kind
from tests.runtime import tiny

BATCH = {"input_ids": [[1, 2, 3]], "labels": [0]}
TEMPLATE = """{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}
{%- set ns.system = m.content | trim %}{% elif loop.index0 % 2 == 0 and m['role'] != 'user' %}
{{- raise_exception('roles must alternate') }}{% else %}{{ bos_token ~ '[' ~ m.role | upper ~ '] ' }}
{{- m.content.split('</think>')[-1].lstrip('\\n') ~ eos_token }}{% endif %}{% endfor %}
{%- macro ask(n) %}{{ 'w' * n }}{% endmacro %}{% if add_generation_prompt %}{{ ask(3) }}{% endif %}"""
MESSAGES = [{"role": "user", "content": "w1 w2"}]


def make(folder: Path) -> None:
    """Write the whole files, in a process that is not forked later."""
    tiny.write_bundle(folder / "classifier", tokenizer=tiny.word_tokenizer())
    tiny.write_bundle(
        folder / "lm",
        "text-generation",
        tokenizer=tiny.word_tokenizer(),
        tokenizer_config={"chat_template": TEMPLATE, "eos_token": {"content": "</s>"}, "bos_token": "w1"},
    )
    save_adapter(tiny.adapter(seed=3, trained=True), folder / "adapter")
    lines = [json.dumps(record) for record in tiny.records(8)]
    lines += ['{"text": "w1 w2 w3", "label": "red"}', '{"text": "w5", "label": 1, "id": [1, {"a": null}]}']
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with edgepeft.load(folder / "lm", threads=1) as model:
        model.read_prompt("w1 w2 w3").save(folder / "prompt")
    with edgepeft.load(folder / "classifier", threads=1) as model:
        options: dict[str, Any] = {"learning_rate": 0.02, "batch_size": 4, "steps": 12}
        model.adapt(tiny.records(), folder / "out", **options)
    bundle = open_bundle(folder / "classifier")
    write_onnx_adapter(bundle, bundle.adapter("mine"), folder / "file.onnx_adapter")
    save_checkpoint(folder / "checkpoint", {"seed": 0}, _state(), Progress(1, [1.0], [0.1], [2.0]))
    write_features(folder, {"red": np.ones((3, 8), np.float32), "green": np.zeros((2, 8), np.float32)})
    onnx.save(_file_model(), folder / "model.onnx")


def kinds(folder: Path) -> dict[str, Callable[[], Kind]]:
    """Every kind by its name; what it needs is imported when it is asked for."""
    seed = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def of(damage: mutate.Mutation, read: Callable[[bytes, Path], None], *paths: str) -> Callable[[], Kind]:
        return lambda: Kind([seed[folder / path] for path in paths], damage, read)

    def in_bundle(bundle: str, file: str, damage: mutate.Mutation, use: Callable[[Path], None]) -> Any:
        def read(data: bytes, work: Path) -> None:
            if not (work / bundle).exists():
                shutil.copytree(folder / bundle, work / bundle)
            _put(folder / bundle, work / bundle, file, data)
            use(work / bundle)

        return lambda: Kind([(folder / bundle / file).read_bytes()], damage, read)

    def picture(suffix: str) -> Callable[[], Kind]:
        return lambda: Kind(_pictures(suffix), mutate.damage, functools.partial(_picture, suffix))

    return {
        "manifest": in_bundle("classifier", "manifest.json", mutate.damage_json, _predict),
        "inference-graph": in_bundle("classifier", "graphs/inference.onnx", mutate.damage_onnx, _predict),
        "training-graph": in_bundle("classifier", "graphs/train.onnx", mutate.damage_onnx, _gradients),
        "weights": in_bundle("classifier", "weights.bin", mutate.damage, _predict),
        "tokenizer": in_bundle("classifier", "tokenizer.json", mutate.damage_json, _predict),
        "tokenizer-config": in_bundle("lm", "tokenizer_config.json", mutate.damage_json, _chat),
        "chat-template": lambda: Kind(
            [TEMPLATE.encode()], mutate.damage, functools.partial(_template, folder)
        ),
        "adapter-config": of(
            mutate.damage_json,
            functools.partial(_adapter, folder, "adapter_config.json"),
            "adapter/adapter_config.json",
        ),
        "adapter-tensors": of(
            mutate.damage_safetensors,
            functools.partial(_adapter, folder, "adapter_model.safetensors"),
            "adapter/adapter_model.safetensors",
        ),
        "onnx-adapter": of(mutate.damage, functools.partial(_onnx_adapter, folder), "file.onnx_adapter"),
        "data": of(mutate.damage_lines, functools.partial(_data, folder), "data.jsonl"),
        "png": picture("png"),
        "jpeg": picture("jpg"),
        "ppm": picture("ppm"),
        "array": lambda: Kind(_arrays(), mutate.damage, _array),
        "wav": lambda: Kind(_recordings(), mutate.damage, _wav),
        "checkpoint": of(mutate.damage_safetensors, _checkpoint, "checkpoint"),
        "report": of(mutate.damage_json, functools.partial(_report, folder), "out/adapt_report.json"),
        "features": of(mutate.damage_safetensors, _features, "head_features.safetensors"),
        "prompt-cache": of(mutate.damage_safetensors, functools.partial(_prompt_cache, folder), "prompt"),
        "onnx-model": lambda: _with_exporter(
            Kind([seed[folder / "model.onnx"]], mutate.damage_onnx, _onnx_model)
        ),
    }


def _put(whole: Path, bundle: Path, file: str, data: bytes) -> None:
    """Have a bundle whose hashes are right and whose file is damaged."""
    (bundle / file).write_bytes(data)
    if file != "manifest.json":
        manifest = json.loads((whole / "manifest.json").read_bytes())
        manifest["files"][file] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (bundle / "manifest.json").write_text(json.dumps(manifest))


def _finite(values: object) -> None:
    """No NaN and no infinity is ever given out."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            _finite(value)
    elif isinstance(values, float | np.ndarray) and not np.isfinite(values).all():
        raise AssertionError("a result is no finite number")


def _predict(bundle: Path) -> None:
    with edgepeft.load(bundle, threads=1) as model:
        _finite(model.predict([{"text": "w1 w2 w9"}, {"input_ids": [3, 4]}], adapter="mine"))


def _gradients(bundle: Path) -> None:
    with edgepeft.load(bundle, threads=1) as model:
        model.loss_and_gradients(BATCH, adapter="mine")


def _chat(bundle: Path) -> None:
    with edgepeft.load(bundle, threads=1) as model:
        model.generate(messages=MESSAGES, max_new_tokens=3)


@functools.cache
def _bundle(path: Path) -> Any:
    return open_bundle(path)


@functools.cache
def _model(path: Path) -> Any:
    return edgepeft.load(path, threads=1)


def _template(folder: Path, data: bytes, work: Path) -> None:
    if not (work / "lm").exists():
        shutil.copytree(folder / "lm", work / "lm")
        manifest = json.loads((work / "lm" / "manifest.json").read_bytes())
        manifest["files"]["chat_template.jinja"] = {"nbytes": 1, "sha256": "0" * 64}
        (work / "lm" / "manifest.json").write_text(json.dumps(manifest))
    (work / "lm" / "chat_template.jinja").write_bytes(data)
    ChatTemplate(_unchecked(work / "lm")).prompt(MESSAGES, "record 1")


@functools.cache
def _unchecked(path: Path) -> Any:
    from edgepeft.bundle.reader import Bundle, read_manifest

    return Bundle(path, read_manifest(path))


def _adapter(folder: Path, file: str, data: bytes, work: Path) -> None:
    if not (work / "adapter").exists():
        shutil.copytree(folder / "adapter", work / "adapter")
    (work / "adapter" / file).write_bytes(data)
    _finite(_model(folder / "classifier").predict([{"input_ids": [1, 2]}], adapter=str(work / "adapter")))


def _onnx_adapter(folder: Path, data: bytes, work: Path) -> None:
    (work / "x.onnx_adapter").write_bytes(data)
    read_onnx_adapter(_bundle(folder / "classifier"), work / "x.onnx_adapter")


def _data(folder: Path, data: bytes, work: Path) -> None:
    (work / "data.jsonl").write_bytes(data)
    model = _model(folder / "classifier")
    try:
        _finite(model.predict(work / "data.jsonl"))
    finally:
        task = task_for(_bundle(folder / "classifier"))
        task.encode_all(records(work / "data.jsonl"), 16, training=True)


def _pictures(suffix: str) -> list[bytes]:
    made = []
    pixels = np.random.default_rng(0).integers(0, 256, (19, 23, 3), np.uint8)
    whole = Image.fromarray(pixels)
    modes = {
        "png": ("RGB", "L", "P", "RGBA", "I;16", "1"),
        "jpg": ("RGB", "L", "CMYK"),
        "ppm": ("RGB", "L", "1"),
    }
    for mode in modes[suffix]:
        for options in ({}, {"progressive": True}) if suffix == "jpg" else ({},):
            file = io.BytesIO()
            image = (
                Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else whole.convert(mode)
            )
            image.save(file, {"jpg": "jpeg"}.get(suffix, suffix), **options)
            made.append(file.getvalue())
    return made


_IMAGES = ImagePreprocessing(
    "bilinear", 1 / 255, (0.5,) * 3, (0.5,) * 3, shortest_edge=8, crop_height=8, crop_width=8
)


def _picture(suffix: str, data: bytes, work: Path) -> None:
    (work / f"x.{suffix}").write_bytes(data)
    _finite(images.preprocess(images.read_image(work / f"x.{suffix}", 3, 8), _IMAGES))


def _arrays() -> list[bytes]:
    made = []
    for array in (
        np.zeros((5, 6, 3), np.uint8),
        np.ones((3, 4), np.float32),
        np.ones(9, np.int16),
        np.ones((2, 3), ">f8"),
        np.ones((4, 4), np.float16, order="F"),
    ):
        file = io.BytesIO()
        np.save(file, array)
        made.append(file.getvalue())
    return made


def _array(data: bytes, work: Path) -> None:
    (work / "x.npy").write_bytes(data)
    record = Record("record 1", {"values": "x.npy"}, work)
    faults: list[Exception] = []
    for read in (
        lambda: images.preprocess(images.read_image(work / "x.npy", 3), _IMAGES),
        lambda: audio.read_audio(work / "x.npy", AudioPreprocessing(16000, True), 1000),
        lambda: read_values(record, "values", [None, None]),
    ):
        try:
            _finite(read())
        except edgepeft.errors.EdgePeftError as error:
            faults.append(error)
    if len(faults) == 3:
        raise faults[0]


def _recordings() -> list[bytes]:
    made = []
    for width in (1, 2, 3, 4):
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setparams((1 + width % 2, width, 16000, 0, "NONE", ""))
            sound.writeframes(np.random.default_rng(0).bytes(width * 2 * 300))
        made.append(file.getvalue())
    return made


def _wav(data: bytes, work: Path) -> None:
    (work / "x.wav").write_bytes(data)
    settings = AudioPreprocessing(16000, True)
    _finite(audio.preprocess(audio.read_audio(work / "x.wav", settings, 1000), settings))


def _state() -> TrainingState:
    return TrainingState({"a": np.arange(40, dtype=np.float32)})


def _checkpoint(data: bytes, work: Path) -> None:
    (work / "checkpoint").write_bytes(data)
    is_finished(work / "checkpoint", work / "nowhere")
    load_checkpoint(work / "checkpoint", {"seed": 0}, _state())


def _report(folder: Path, data: bytes, work: Path) -> None:
    (work / "report").write_bytes(data)
    is_finished(folder / "checkpoint", work / "report")
    read_report(work / "report").to_json()


def _features(data: bytes, work: Path) -> None:
    (work / "head_features.safetensors").write_bytes(data)
    _finite(read_features(work, ["red", "green"], 8))


def _prompt_cache(folder: Path, data: bytes, work: Path) -> None:
    (work / "prompt").write_bytes(data)
    cache = open_prompt_cache(work / "prompt", _bundle(folder / "lm").manifest)
    state = cache.state(len(cache.ids))
    for name in state:
        state[name]


def _file_model() -> onnx.ModelProto:
    """A classifier as an exporter of torch would write it."""
    random = np.random.default_rng(0)
    shapes = {
        "embeddings.weight": (24, 8),
        "dense.weight": (8, 8),
        "classifier.weight": (3, 8),
        "classifier.bias": (3,),
    }
    weights = [
        onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Gather", ["embeddings.weight", "input_ids"], ["x"], "gather"),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("Gemm", ["mean", "dense.weight"], ["h"], "dense", transB=1),
        helper.make_node("Tanh", ["h"], ["t"], "tanh"),
        helper.make_node("Gemm", ["t", "classifier.weight", "classifier.bias"], ["logits"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [*weights, onnx.numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _with_exporter(kind: Kind) -> Kind:
    """Import once what every process would."""
    importlib.import_module("edgepeft.exporters.sources.onnx_file")
    return kind


def _onnx_model(data: bytes, work: Path) -> None:
    from edgepeft.exporters.sources.onnx_file import load_onnx_file  # for workstations alone

    (work / "model.onnx").write_bytes(data)
    load_onnx_file(work / "model.onnx", task="text-classification", labels=["a", "b", "c"])
