"""What is known of a model in an ONNX file beside its graph: the configuration files next to it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepeft.errors import ExportError, UsageError

from ..passes.drop_cache import is_cache


@dataclass
class FileConfig:
    """The part of a transformers configuration that a bundle's manifest is made of.

    Read from `config.json` (transformers), then `genai_config.json` (onnxruntime-genai); what neither says is
    taken from the graph: the vocabulary from the embedding or the logits, the classes from the logits, the
    layers from the cache, the context from the tables of positions.
    """

    model_type: str
    vocab_size: int
    max_position_embeddings: int | None
    num_hidden_layers: int
    hidden_size: int
    id2label: dict[int, str] = field(default_factory=dict)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    problem_type: str | None = None

    @property
    def num_labels(self) -> int:
        """Classes of a classifier."""
        return len(self.id2label)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
        ExportError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def genai_type(folder: Path) -> str | None:
    """`model.type` of the genai configuration in `folder`."""
    model = read_json(folder / "genai_config.json").get("model", {})
    return model.get("type") if isinstance(model, dict) else None


def read_config(folder: Path, graph: ir.Graph, output: ir.Value, labels: list[str] | None) -> FileConfig:
    """The configuration of the model whose graph this is.

    Args:
        folder: where the file is.
        output: the graph's output that the task is about.
        labels: names of the classes, which the configuration may not have.

    Raises:
        UsageError: there are not as many labels as classes.
        ExportError: a size is neither in a file nor in the graph.
    """
    hub = read_json(folder / "config.json")
    genai = read_json(folder / "genai_config.json").get("model", {})
    if not isinstance(genai, dict) or not isinstance(genai.get("decoder", {}), dict):
        raise ExportError(f"{folder / 'genai_config.json'}: model and its decoder are to be objects")
    settings = {**genai, **{key: value for key, value in hub.items() if value is not None}}
    _check_kinds(settings, folder)
    assert output.shape is not None
    last = output.shape[-1]
    width = last if isinstance(last, int) else 0
    decoder = genai.get("decoder", {})
    layers = settings.get("num_hidden_layers") or decoder.get("num_hidden_layers")
    caches = sum(1 for value in graph.inputs if is_cache(value)) // 2
    return FileConfig(
        model_type=str(settings.get("model_type") or settings.get("type") or "onnx"),
        vocab_size=_vocabulary(settings, graph, output),
        max_position_embeddings=settings.get("max_position_embeddings")
        or settings.get("context_length")
        or _positions(graph),
        num_hidden_layers=int(layers or caches),
        hidden_size=width,
        id2label=_labels(settings, width, labels) if len(output.shape) == 2 else {},
        pad_token_id=settings.get("pad_token_id"),
        bos_token_id=settings.get("bos_token_id"),
        eos_token_id=settings.get("eos_token_id"),
        problem_type=settings.get("problem_type"),
    )


def _check_kinds(settings: dict[str, Any], folder: Path) -> None:
    """Refuse a setting that is no number where it has to be one.

    Raises:
        ExportError: names it.
    """
    sizes = ("vocab_size", "max_position_embeddings", "context_length", "num_hidden_layers")
    for name in (*sizes, "pad_token_id", "bos_token_id", "eos_token_id"):
        value = settings.get(name)
        listed = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if any(item is not None and type(item) is not int for item in listed):
            raise ExportError(
                f"{folder}: config.json or genai_config.json has {name} {value!r}, expected a whole number"
            )


def _vocabulary(settings: dict[str, Any], graph: ir.Graph, output: ir.Value) -> int:
    sizes = [settings.get("vocab_size"), looked_up_rows(graph)]
    if output.shape is not None and len(output.shape) == 3:
        sizes.append(output.shape[-1])
    for size in sizes:
        if isinstance(size, int) and size > 0:
            return size
    raise ExportError(
        "the size of the vocabulary is neither in config.json nor in the graph: put the model's config.json "
        "beside the file"
    )


def _positions(graph: ir.Graph) -> int | None:
    """Rows of the smallest table of positions: of embeddings that are named so, or of rotary caches."""
    rows: list[int] = []
    for node in graph:
        table = None
        if node.op_type == "GroupQueryAttention" and node.attributes.get_int("do_rotary", 0) > 0:
            table = node.inputs[7]
        elif node.op_type == "RotaryEmbedding":
            table = node.inputs[2 if node.domain else 1]
        elif node.op_type == "Gather" and "position" in (node.inputs[0].name or "" if node.inputs[0] else ""):
            table = node.inputs[0]
        tensor = table.const_value if table is not None else None
        if tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point():
            rows.append(int(tensor.shape[0]))  # type: ignore[arg-type]
    return min(rows, default=None)


def looked_up_rows(graph: ir.Graph) -> int | None:
    """Rows of the table in which `input_ids` are looked up."""
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    for node, position in ids.uses() if ids is not None else ():
        if node.op_type in ("Gather", "GatherBlockQuantized") and position == 1:
            table = node.inputs[2 if node.op_type == "GatherBlockQuantized" else 0]
            rows = table.shape[0] if table is not None and table.shape is not None else None
            if isinstance(rows, int):
                return rows
    return None


def _labels(settings: dict[str, Any], classes: int, labels: list[str] | None) -> dict[int, str]:
    if labels is not None:
        if classes and len(labels) != classes:
            raise UsageError(f"--labels names {len(labels)} classes, the file's logits have {classes}")
        return dict(enumerate(labels))
    try:
        named = {int(index): str(label) for index, label in (settings.get("id2label") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise ExportError(
            f"config.json: id2label does not name classes by their numbers ({error})"
        ) from error
    classes = classes or len(named)
    if not classes:
        raise ExportError("the number of classes is neither in config.json nor in the graph: pass --labels")
    return {index: named.get(index, f"LABEL_{index}") for index in range(classes)}
