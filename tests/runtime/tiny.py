"""Bundles written by hand with onnx.helper, so that the runtime is tested without the exporter.

All three tasks share one encoder: embeddings are averaged, then `h = tanh(x W + ((x A) s) B)`. The classifier
puts a saved head on it, the sentence encoder normalizes it, and the language model averages over the past
instead of the whole text, with the embeddings it has seen as its cache. Their gradients are by hand too.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgepeft.adapters import PREFIX, Adapter, write_adapter
from edgepeft.bundle.manifest import (
    FORMAT_VERSION,
    GraphSpec,
    Manifest,
    ModelInfo,
    Policy,
    Quantization,
    Strategy,
    TensorSpec,
    WeightTensor,
)
from edgepeft.bundle.memory_formula import MemoryFormula, MemoryTerm
from edgepeft.bundle.writer import hash_folder, write_manifest
from edgepeft.slots import Slot
from edgepeft.techniques import lora, whole

VOCAB, WIDTH, MAX_LENGTH = 24, 8, 16
LABELS = ("red", "green", "blue")
MODULE = "encoder.dense"
A = f"{PREFIX}{MODULE}.lora_A.weight"
B = f"{PREFIX}{MODULE}.lora_B.weight"
SCALING = f"{MODULE}.scaling"
HEAD, BIAS = f"{PREFIX}classifier.weight", f"{PREFIX}classifier.bias"
EOS = 23

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The frozen weights and the head's default, float32."""
    rng = np.random.default_rng(seed)
    return {
        "embedding": rng.standard_normal((VOCAB, WIDTH)).astype(np.float32),
        "dense": (rng.standard_normal((WIDTH, WIDTH)) / 3).astype(np.float32),
        "unembedding": rng.standard_normal((WIDTH, VOCAB)).astype(np.float32),
        "classifier.weight": (rng.standard_normal((len(LABELS), WIDTH)) / 3).astype(np.float32),
        "classifier.bias": np.zeros(len(LABELS), np.float32),
    }


def adapter(
    rank: int = 2, seed: int = 1, task: str = "text-classification", trained: bool = False
) -> Adapter:
    """An adapter for the tiny model; an untrained one has a zero B and the default head."""
    rng = np.random.default_rng(seed)
    tensors = {
        A: rng.standard_normal((rank, WIDTH)).astype(np.float32) / 3,
        B: rng.standard_normal((WIDTH, rank)).astype(np.float32) * trained,
    }
    if task == "text-classification":
        tensors[HEAD] = weights()["classifier.weight"] + np.float32(trained) * tensors[A][:1, :1]
        tensors[BIAS] = weights()["classifier.bias"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["dense"],
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": None,
        "a_key_of_the_future": {"kept": True},
    }
    return Adapter(config=config, tensors=tensors)


class _Graph:
    """Collects nodes; initializers live in weights.bin."""

    def __init__(self, stored: dict[str, WeightTensor]) -> None:
        self.stored = stored
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.used: set[str] = set()

    def add(self, op: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        output = output or f"v{len(self.nodes)}"
        self.used.update(inputs)
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def ints(self, *values: int) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def number(self, value: float) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def transpose(self, value: str) -> str:
        return self.add("Transpose", [value], perm=[1, 0])

    def write(self, path: Path, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> GraphSpec:
        external = []
        for name in sorted(self.used & self.stored.keys()):
            weight = self.stored[name]
            tensor = TensorProto(
                name=name,
                data_type=TensorProto.FLOAT,
                dims=weight.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in {
                "location": "weights.bin",
                "offset": weight.offset,
                "length": weight.nbytes,
            }.items():
                tensor.external_data.add(key=key, value=str(value))
            external.append(tensor)
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [
                helper.make_tensor_value_info(
                    # The shape of a scaling is left open, so that it may have an axis for the batch.
                    spec.name,
                    _TYPES[spec.dtype],
                    None if spec.name == SCALING and path.stem == "inference" else spec.shape,
                )
                for spec in inputs
            ],
            [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape) for spec in outputs],
            [*external, *self.constants],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
        path.write_bytes(model.SerializeToString())
        return GraphSpec(f"graphs/{path.name}", tuple(inputs), tuple(outputs))


_IDS = [
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "sequence")),
]
_LORA = [
    TensorSpec(A, "float32", (WIDTH, "rank")),
    TensorSpec(B, "float32", ("rank", WIDTH)),
    TensorSpec(SCALING, "float32", ("rank",)),
]
_SAVED = [
    TensorSpec(HEAD, "float32", (len(LABELS), WIDTH)),
    TensorSpec(BIAS, "float32", (len(LABELS),)),
]
_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "clip_coef")


def _mean(g: _Graph) -> str:
    """Average of the embeddings that are not padding, [batch, width]."""
    mask = g.add("Unsqueeze", [g.add("Cast", ["attention_mask"], to=TensorProto.FLOAT), g.ints(2)])
    masked = g.add("Mul", [g.add("Gather", ["embedding", "input_ids"]), mask])
    total = g.add("ReduceSum", [masked, g.ints(1)], keepdims=0)
    return g.add("Div", [total, g.add("ReduceSum", [mask, g.ints(1)], keepdims=0)])


def _dense(g: _Graph, x: str) -> tuple[str, str]:
    """tanh(x W + ((x A) s) B), and (x A) s."""
    scaled = g.add("Mul", [g.add("MatMul", [x, A]), SCALING])
    z = g.add("Add", [g.add("MatMul", [x, "dense"]), g.add("MatMul", [scaled, B])])
    return g.add("Tanh", [z]), scaled


def _lora_gradients(g: _Graph, x: str, scaled: str, h: str, dh: str) -> None:
    """Gradients of A and B for rows x [n, width]."""
    dz = g.add("Mul", [dh, g.add("Sub", [g.number(1), g.add("Mul", [h, h])])])
    g.add("MatMul", [g.transpose(scaled), dz], f"grad.{B}")
    back = g.add("Mul", [g.add("MatMul", [dz, g.transpose(B)]), SCALING])
    g.add("MatMul", [g.transpose(x), back], f"grad.{A}")


def _cross_entropy(g: _Graph, logits: str, labels: str) -> str:
    """Mean cross-entropy of rows; its gradient with respect to the logits."""
    g.add("SoftmaxCrossEntropyLoss", [logits, labels], "loss", ignore_index=-100, reduction="mean")
    counted = g.add("Not", [g.add("Equal", [labels, g.ints(-100)])])
    counted = g.add("Cast", [counted], to=TensorProto.FLOAT)
    safe = g.add("Max", [labels, g.ints(0)])
    depth = g.add("Shape", [logits], start=1)
    hot = g.add("OneHot", [safe, depth, g.add("Concat", [_pair(g, 0), _pair(g, 1)], axis=0)], axis=-1)
    share = g.add("Div", [counted, g.add("ReduceSum", [counted], keepdims=0)])
    difference = g.add("Sub", [g.add("Softmax", [logits], axis=-1), hot])
    return g.add("Mul", [difference, g.add("Unsqueeze", [share, g.ints(1)])])


def _pair(g: _Graph, value: float) -> str:
    return g.add("Unsqueeze", [g.number(value), g.ints(0)])


def _classifier(folder: Path, stored: dict[str, WeightTensor]) -> dict[str, GraphSpec]:
    def logits(g: _Graph) -> tuple[str, str, str, str]:
        x = _mean(g)
        h, scaled = _dense(g, x)
        return x, scaled, h, g.add("Add", [g.add("MatMul", [h, g.transpose(HEAD)]), BIAS], "logits")

    shape = ("batch", len(LABELS))
    out = TensorSpec("logits", "float32", shape)
    labels = TensorSpec("labels", "int64", ("batch",))
    loss = TensorSpec("loss", "float32", ())
    inference, train, judge = _Graph(stored), _Graph(stored), _Graph(stored)
    logits(inference)
    _cross_entropy(judge, "logits", "labels")
    x, scaled, h, out_name = logits(train)
    d = _cross_entropy(train, out_name, "labels")
    train.add("MatMul", [train.transpose(d), h], f"grad.{HEAD}")
    train.add("ReduceSum", [d, train.ints(0)], f"grad.{BIAS}", keepdims=0)
    _lora_gradients(train, x, scaled, h, train.add("MatMul", [d, HEAD]))
    inputs = [*_IDS, *_LORA, *_SAVED]
    gradients = [replace(spec, name=f"grad.{spec.name}") for spec in (*_LORA[:2], *_SAVED)]
    return {
        "inference": inference.write(folder / "inference.onnx", inputs, [out]),
        "loss": judge.write(folder / "loss.onnx", [out, labels], [loss]),
        "train": train.write(folder / "train.onnx", [*inputs, labels], [loss, *gradients]),
    }


def _encoder(folder: Path, stored: dict[str, WeightTensor]) -> dict[str, GraphSpec]:
    g, judge = _Graph(stored), _Graph(stored)
    h, _ = _dense(g, _mean(g))
    g.add("LpNormalization", [h], "sentence_embedding", axis=1, p=2)
    # -log softmax of 20 x cosine between each anchor and all positives, at its own.
    judge.nodes.append(
        helper.make_node("Split", ["sentence_embedding"], ["left", "right"], num_outputs=2, axis=0)
    )
    scores = judge.add("Mul", [judge.add("MatMul", ["left", judge.transpose("right")]), judge.number(20)])
    count = judge.add("Squeeze", [judge.add("Shape", [scores], end=1), judge.ints(0)])
    zero = judge.add("Squeeze", [judge.ints(0), judge.ints(0)])
    one = judge.add("Squeeze", [judge.ints(1), judge.ints(0)])
    judge.add(
        "SoftmaxCrossEntropyLoss", [scores, judge.add("Range", [zero, count, one])], "loss", reduction="mean"
    )
    out = TensorSpec("sentence_embedding", "float32", ("batch", WIDTH))
    return {
        "inference": g.write(folder / "inference.onnx", [*_IDS, *_LORA], [out]),
        "loss": judge.write(folder / "loss.onnx", [out], [TensorSpec("loss", "float32", ())]),
    }


def _language_model(folder: Path, stored: dict[str, WeightTensor]) -> dict[str, GraphSpec]:
    def running_mean(g: _Graph, seen: str, count: str) -> str:
        total = g.add("CumSum", [seen, g.ints(2)])
        numbers = g.add("Range", [_scalar(g, 1), g.add("Add", [count, _scalar(g, 1)]), _scalar(g, 1)])
        numbers = g.add("Cast", [numbers], to=TensorProto.FLOAT)
        return g.add("Div", [total, g.add("Unsqueeze", [numbers, g.ints(0, 1, 3)])])

    inference = _Graph(stored)
    new = inference.add("Unsqueeze", [inference.add("Gather", ["embedding", "input_ids"]), inference.ints(1)])
    seen = inference.add("Concat", ["past_key_values.0.key", new], "present.0.key", axis=2)
    inference.add("Identity", ["past_key_values.0.value"], "past")
    inference.add("Concat", ["past", new], "present.0.value", axis=2)
    count = inference.add("Squeeze", [inference.add("Shape", [seen], start=2, end=3), inference.ints(0)])
    past = inference.add("Shape", ["past_key_values.0.key"], start=2, end=3)
    mean = inference.add(
        "Slice", [running_mean(inference, seen, count), past, inference.ints(2**31), inference.ints(2)]
    )
    h, _ = _dense(inference, inference.add("Squeeze", [mean, inference.ints(1)]))
    inference.add("MatMul", [h, "unembedding"], "logits")

    def shifted(g: _Graph, logits: str) -> tuple[str, str]:
        rows = g.add("Slice", [logits, g.ints(0), g.ints(-1), g.ints(1)])
        targets = g.add("Slice", ["labels", g.ints(1), g.ints(2**31), g.ints(1)])
        return g.add("Reshape", [rows, g.ints(-1, VOCAB)]), g.add("Reshape", [targets, g.ints(-1)])

    judge = _Graph(stored)
    _cross_entropy(judge, *shifted(judge, "logits"))
    train = _Graph(stored)
    new = train.add("Unsqueeze", [train.add("Gather", ["embedding", "input_ids"]), train.ints(1)])
    count = train.add("Squeeze", [train.add("Shape", [new], start=2, end=3), train.ints(0)])
    mean = train.add("Squeeze", [running_mean(train, new, count), train.ints(1)])
    kept = train.add("Slice", [mean, train.ints(0), train.ints(-1), train.ints(1)])
    x = train.add("Reshape", [kept, train.ints(-1, WIDTH)])
    h, scaled = _dense(train, x)
    targets = train.add("Slice", ["labels", train.ints(1), train.ints(2**31), train.ints(1)])
    d = _cross_entropy(
        train, train.add("MatMul", [h, "unembedding"]), train.add("Reshape", [targets, train.ints(-1)])
    )
    _lora_gradients(train, x, scaled, h, train.add("MatMul", [d, train.transpose("unembedding")]))

    logits = TensorSpec("logits", "float32", ("batch", "sequence", VOCAB))
    labels = TensorSpec("labels", "int64", ("batch", "sequence"))
    loss = TensorSpec("loss", "float32", ())
    mask = TensorSpec("attention_mask", "int64", ("batch", "total_sequence"))
    caches = [
        TensorSpec(f"past_key_values.0.{kind}", "float32", ("batch", 1, "past_sequence", WIDTH))
        for kind in ("key", "value")
    ]
    presents = [
        TensorSpec(f"present.0.{kind}", "float32", ("batch", 1, "total_sequence", WIDTH))
        for kind in ("key", "value")
    ]
    gradients = [replace(spec, name=f"grad.{spec.name}") for spec in _LORA[:2]]
    return {
        "inference": inference.write(
            folder / "inference.onnx", [_IDS[0], mask, *caches, *_LORA], [logits, *presents]
        ),
        "loss": judge.write(folder / "loss.onnx", [logits, labels], [loss]),
        "train": train.write(folder / "train.onnx", [*_IDS, *_LORA, labels], [loss, *gradients]),
    }


def _scalar(g: _Graph, value: int) -> str:
    name = f"c{len(g.constants)}"
    g.constants.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    return name


def _optimizer(folder: Path) -> dict[str, GraphSpec]:
    g = _Graph({})
    one = g.number(1)
    clipped = g.add("Mul", ["grad", "clip_coef"])
    first = g.add("Mul", ["exp_avg", "beta1"])
    first = g.add("Add", [first, g.add("Mul", [clipped, g.add("Sub", [one, "beta1"])])], "exp_avg_out")
    second = g.add("Mul", ["exp_avg_sq", "beta2"])
    square = g.add("Mul", [g.add("Mul", [clipped, clipped]), g.add("Sub", [one, "beta2"])])
    second = g.add("Add", [second, square], "exp_avg_sq_out")
    mean = g.add("Div", [first, g.add("Sub", [one, g.add("Pow", ["beta1", "step"])])])
    root = g.add("Sqrt", [g.add("Div", [second, g.add("Sub", [one, g.add("Pow", ["beta2", "step"])])])])
    decayed = g.add("Mul", ["param", g.add("Sub", [one, g.add("Mul", ["lr", "weight_decay"])])])
    update = g.add("Div", [g.add("Mul", [mean, "lr"]), g.add("Add", [root, "eps"])])
    g.add("Sub", [decayed, update], "param_out")
    vectors = [TensorSpec(name, "float32", ("n",)) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    outputs = [TensorSpec(f"{name}_out", "float32", ("n",)) for name in ("param", "exp_avg", "exp_avg_sq")]
    scalars = [TensorSpec(name, "float32", ()) for name in _SCALARS]
    norm = _Graph({})
    norm.add("ReduceSumSquare", ["grad"], "sum_of_squares", keepdims=0)
    return {
        "adamw": g.write(folder / "adamw.onnx", [*vectors, *scalars], outputs),
        "grad_norm": norm.write(
            folder / "grad_norm.onnx",
            [TensorSpec("grad", "float32", ("n",))],
            [TensorSpec("sum_of_squares", "float32", ())],
        ),
    }


def write_bundle(
    folder: Path,
    task: str = "text-classification",
    *,
    policy: Policy | None = None,
    adapters: dict[str, Adapter] | None = None,
    tokenizer: dict[str, object] | None = None,
    tokenizer_config: dict[str, object] | None = None,
    base: str | None = None,
) -> Path:
    """Write a tiny bundle of a task; the sentence encoder has no training graph."""
    (folder / "graphs").mkdir(parents=True)
    stored, blob = {}, b""
    for name, array in weights().items():
        blob += b"\0" * (-len(blob) % 4096)
        stored[name] = WeightTensor("float32", array.shape, len(blob), array.nbytes)
        blob += array.tobytes()
    (folder / "weights.bin").write_bytes(blob)
    make = {
        "text-classification": _classifier,
        "feature-extraction": _encoder,
        "text-generation": _language_model,
    }[task]
    graphs = {**make(folder / "graphs", stored), **_optimizer(folder / "graphs")}
    adapters = {"mine": adapter(task=task)} if adapters is None else adapters
    for name, item in adapters.items():
        (folder / "adapters" / name).mkdir(parents=True)
        write_adapter(item, folder / "adapters" / name)
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", tokenizer_config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    saved = (
        (
            whole.new_slot("classifier", "weight", (len(LABELS), WIDTH), "classifier.weight"),
            whole.new_slot("classifier", "bias", (len(LABELS),), "classifier.bias"),
        )
        if task == "text-classification"
        else ()
    )
    trainable = (A, B, *(name for slot in saved for name in slot.inputs)) if "train" in graphs else ()
    memory = MemoryFormula(2**20, ((MemoryTerm(64.0, 1, 1), MemoryTerm(64.0, 1, 0, 1)),))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        edgepeft_version="0",
        task=task,
        model=ModelInfo(
            name="tiny",
            model_type="tiny",
            architecture="Tiny",
            max_length=MAX_LENGTH,
            vocab_size=VOCAB,
            pad_token_id=0,
            eos_token_ids=(EOS,) if task == "text-generation" else (),
            labels=LABELS if task == "text-classification" else (),
            embedding_size=WIDTH if task == "feature-extraction" else None,
            num_layers=1,
        ),
        quantization=Quantization(32, 0),
        graphs=graphs,
        inference_memory=memory,
        weights_file="weights.bin",
        weights=stored,
        slots=(_slot(3 if "generation" in task else 2), *saved),
        adapters=tuple(adapters),
        strategies=(Strategy("resident", "train", exact=True, memory=memory),) if "train" in graphs else (),
        policy=policy or Policy(trainable=trainable),
        verification={},
        files=hash_folder(folder),
        base=base,
    )
    write_manifest(manifest, folder)
    return folder


def _slot(activation_axes: int) -> Slot:
    slot = lora.new_slot(MODULE, WIDTH, WIDTH, activation_axes)
    *factors, scaling = slot.tensors
    return replace(slot, tensors=(*factors, replace(scaling, input=SCALING)))


def word_tokenizer() -> dict[str, object]:
    """A tokenizer.json of whole words `w1` … `w22`, with `</s>` as token 23."""
    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, EOS)}, "</s>": EOS}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": EOS,
                "content": "</s>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
    }


def records(count: int = 40, seed: int = 0) -> list[dict[str, object]]:
    """Classification records that can be learned: a label's own tokens are frequent in it."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = int(rng.integers(len(LABELS)))
        ids = np.where(rng.random(6) < 0.7, 3 + label, rng.integers(1, VOCAB, 6))[: int(rng.integers(3, 7))]
        rows.append({"input_ids": ids.tolist(), "label": LABELS[label]})
    return rows


def sentences(count: int = 24, seed: int = 0) -> list[dict[str, object]]:
    """Language-modelling records: counting upwards from somewhere."""
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": [int(start + offset) for offset in range(6)]}
        for start in rng.integers(1, VOCAB - 8, count)
    ]
