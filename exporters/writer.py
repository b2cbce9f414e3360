"""Write graphs and weights of a bundle: equal bytes are stored once, whatever number of graphs reads them."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from edgepeft.bundle.manifest import GraphSpec, TensorSpec, WeightTensor

from .graph import digest, tidy
from .passes.run_order import run_in_order
from .quantize.lower_minimums import lower_minimums

#: Constants below this size stay inside the ONNX file; weights, whose names are dotted paths, never do.
#: Integers do under any name: onnxruntime infers shapes from them, which it does not from external data.
#: So do single numbers: exporters call them after the module that uses them, as they do its weights.
INLINE_BYTES = 1024
#: A page: every tensor can be mapped, or read directly, by itself.
ALIGNMENT = 4096
#: A cache line: where a tensor that is a part of another may begin.
PART_ALIGNMENT = 64


class WeightWriter:
    """Appends tensors to `weights.bin`; a tensor with bytes that are there already shares them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}
        self.tensors: dict[str, WeightTensor] = {}

    def add(self, name: str, tensor: ir.TensorProtocol) -> WeightTensor:
        """Store `tensor` under `name` and say where."""
        data = tensor.tobytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[digest] = self._file.tell()
            self._file.write(data)
        stored = WeightTensor(
            dtype=tensor.dtype.numpy().name,
            shape=tuple(tensor.shape.numpy()),
            offset=self._offsets[digest],
            nbytes=len(data),
        )
        if self.tensors.setdefault(name, stored) != stored:
            raise ValueError(f"two different tensors are named {name!r}")
        return stored

    def add_parts(self, name: str, tensor: ir.TensorProtocol, rows: Sequence[int]) -> None:
        """Store `tensor` under `name`, and let those of its parts, so many rows each, be found in its bytes.

        A part that would begin at no multiple of `PART_ALIGNMENT` is not shared.
        """
        whole = self.add(name, tensor)
        data = tensor.tobytes()
        row_bytes = len(data) // tensor.shape.numpy()[0]
        first = 0
        for count in rows:
            part = data[first * row_bytes : (first + count) * row_bytes]
            if first * row_bytes % PART_ALIGNMENT == 0:
                self._offsets.setdefault(hashlib.sha256(part).digest(), whole.offset + first * row_bytes)
            first += count

    def add_array(self, name: str, array: np.ndarray) -> WeightTensor:
        """Store a numpy array."""
        return self.add(name, ir.tensor(np.ascontiguousarray(array), name=name))


def is_weight(name: str, tensor: ir.TensorProtocol) -> bool:
    """Whether a constant of a graph is kept in `weights.bin`."""
    is_shape = tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    return tensor.nbytes >= INLINE_BYTES or ("." in name and tensor.size > 1 and not is_shape)


def rename_others(graph: ir.Graph, known: ir.Graph) -> None:
    """Rename those constants of `graph` that `known` has other constants of the same name for: what is folded
    in two graphs is numbered in each."""
    for name, value in list(graph.initializers.items()):
        there = known.initializers.get(name)
        mine, other = value.const_value, None if there is None else there.const_value
        if mine is None or other is None or mine is other:
            continue
        if mine.dtype != other.dtype or mine.shape != other.shape or mine.tobytes() != other.tobytes():
            value.name = f"{name}.{digest(mine)}"


def write_graph(
    model: ir.Model,
    path: Path,
    weights: WeightWriter,
    weights_file: str,
    unshaped: Collection[str] = (),
) -> None:
    """Serialize `model` to `path`, its weights and large constants to `weights`.

    Args:
        unshaped: inputs whose shape the file leaves open, so that onnxruntime takes any number of axes.
    """
    if lower_minimums(model.graph):
        tidy(model)
    kept: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if not is_weight(name, tensor):
            continue
        stored = weights.add(name, tensor)
        kept[name] = tensor
        value.const_value = ir.ExternalTensor(
            weights_file,
            stored.offset,
            stored.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )
    try:
        _strip_metadata(model)
        run_in_order(model.graph)
        proto = ir.to_proto(model)
        open_inputs = {*unshaped, *_tables_of_open_length(model.graph)}
        for value in proto.graph.input:
            if value.name in open_inputs:
                value.type.tensor_type.ClearField("shape")
        path.write_bytes(proto.SerializeToString(deterministic=True))
    finally:
        for name, tensor in kept.items():
            model.graph.initializers[name].const_value = tensor


def _tables_of_open_length(graph: ir.Graph) -> set[str]:
    """Inputs that rows are looked up in beside zero points of unknown number: onnxruntime takes zero points
    and scales for equal only where it knows both numbers, and asks for neither where the table has no
    shape."""
    return {
        table.name
        for node in graph
        if node.op_type == "GatherBlockQuantized" and len(node.inputs) > 3
        if (table := node.inputs[0]) is not None and table.is_graph_input() and table.name is not None
        if table.shape is None or not isinstance(table.shape[0], int)
    }


def graph_spec(model: ir.Model, file: str, *, serves: bool) -> GraphSpec:
    """The signature of `model` for the manifest.

    Args:
        model: the graph.
        file: its path in the bundle.
        serves: it is run again and again in one session, token by token or text by text.
    """
    return GraphSpec(
        file=file,
        inputs=tuple(_tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in model.graph.outputs),
        folds=serves and _computes_constants(model.graph),
    )


def _computes_constants(graph: ir.Graph) -> bool:
    """Whether codes or scales of a product are computed. Without folding that would be done at every run, and
    onnxruntime 1.32 multiplies rounded activations by scales that are no constants wrongly."""
    products = (node for node in graph if node.op_type == "MatMulNBits")
    return any(
        value is not None and value.producer() is not None for node in products for value in node.inputs[1:]
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _strip_metadata(model: ir.Model) -> None:
    """Drop stack traces and other traces of the machine that exported; of a node's scopes the innermost
    module's name stays, for whoever looks at the graph."""
    for node in model.graph:
        module = _module(node.metadata_props.get("namespace", ""))
        node.metadata_props.clear()
        node.doc_string = None
        if module:
            node.metadata_props["namespace"] = module


def _module(scopes: str) -> str:
    """The innermost named module of `: Class/model: Class/model.layers.0: Class/add_1: aten.add.Tensor`, with
    the classes' full names."""
    parts = [part.partition(": ") for part in scopes.split("/")]
    modules = (name for name, _, kind in reversed(parts) if "." in kind and not kind.startswith("aten."))
    return next((name for name in modules if name), "")
