"""Small helpers for editing `onnx_ir` graphs, shared by the passes, the losses and the training graphs."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64
MICROSOFT = "com.microsoft"
#: Operator sets every graph of a bundle imports: `DequantizeLinear` knows blocks since 21, `Attention`,
#: `RMSNormalization` and `RotaryEmbedding` exist since 23, the quantized matrix product is a contrib
#: operator.
OPSET_IMPORTS = {"": 23, MICROSOFT: 1}
IR_VERSION = 11
# Marks a node that a technique put behind another's output; it is not written into a file.
_BEHIND = "edgepeft.behind"
# Marks a node whose output is a constant to gradients; nor is this.
_DETACHED = "edgepeft.detached"
# Marks a node whose output says of tokens only where they stand, as a mask does; nor is this.
_SHARED = "edgepeft.shared"

Shape = Sequence[int | str | ir.SymbolicDim | None]


def append(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    shape: Shape | ir.Shape | None,
    dtype: ir.DataType | None = FLOAT,
    domain: str = "",
    name: str | None = None,
) -> ir.Value:
    """Append one single-output node and return its output, typed and shaped; `sort` restores the order
    later."""
    output = ir.Value(
        name=name,
        shape=None if shape is None else ir.Shape(shape),
        type=None if dtype is None else ir.TensorType(dtype),
    )
    node = ir.node(op_type, inputs, dict(attributes or {}), domain=domain, outputs=[output])
    graph.append(node)
    return output


def initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """The initializer `name` with these values, made where the graph does not have it; named otherwise where
    the graph has another of that name, as somebody else's file may."""
    tensor = ir.tensor(array, name=name)
    there = graph.initializers.get(name)
    if there is not None and _same_tensor(there.const_value, tensor):
        return there
    if there is not None or any(value.name == name for value in graph.inputs):
        name = f"{name}.{digest(tensor)}"
        if name in graph.initializers:
            return graph.initializers[name]
        tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def digest(tensor: ir.TensorProtocol) -> str:
    """What tells constants of the same name apart, in whatever graph they are."""
    described = f"{tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes()
    return hashlib.sha256(described).hexdigest()[:12]


def _same_tensor(a: ir.TensorProtocol | None, b: ir.TensorProtocol) -> bool:
    if a is b:
        return True
    return a is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def graph_input(graph: ir.Graph, name: str, shape: Shape, dtype: ir.DataType = FLOAT) -> ir.Value:
    """Add a graph input; a constant that has its name, in somebody else's file, gets another."""
    if name in graph.initializers:
        taken = graph.initializers[name]
        assert taken.const_value is not None
        taken.name = f"{name}.{digest(taken.const_value)}"
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def zero_after(graph: ir.Graph, *values: ir.Value) -> ir.Value:
    """The int64 scalar 0, there when `values` are and not before: what it is added to has to wait."""
    total, *others = [append(graph, "Size", [value], shape=[], dtype=INT64) for value in values]
    for size in others:
        total = append(graph, "Add", [total, size], shape=[], dtype=INT64)
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    return append(graph, "Mul", [total, zero], shape=[], dtype=INT64)


def constant_value(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or `Constant` output as numpy, or None where it is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def tidy(model: ir.Model) -> None:
    """Sort nodes topologically, merge duplicates and drop what no output needs."""
    TopologicalSortPass()(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def new_model(graph: ir.Graph) -> ir.Model:
    """A model around `graph` with edgepeft's operator sets."""
    graph.opset_imports.clear()
    graph.opset_imports.update(OPSET_IMPORTS)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgepeft")


def put_behind(
    graph: ir.Graph,
    output: ir.Value,
    op_type: str,
    other: ir.Value,
    only: Collection[ir.Node] | None = None,
    *,
    but: Collection[ir.Node] = (),
) -> None:
    """Have everything that reads `output`, and the graph where it is an output, read `op_type(output, other)`
    instead, which has its shape. With `only`, these nodes alone do; `but` do not, by which `other` may be
    made of `output`."""
    readers = [
        (reader, position)
        for reader, position in output.uses()
        if (only is None or reader in only) and reader not in but
    ]
    made = append(graph, op_type, [output, other], shape=output.shape)
    node = made.producer()
    assert node is not None
    node.metadata_props[_BEHIND] = op_type
    for reader, position in readers:
        reader.replace_input_with(position, made)
    if only is None and output.is_graph_output():
        graph.outputs[list(graph.outputs).index(output)] = made
        made.name, output.name = output.name, None


def detach(value: ir.Value) -> ir.Value:
    """Have no gradient flow through the node that makes `value`; returns it."""
    node = value.producer()
    assert node is not None
    node.metadata_props[_DETACHED] = "true"
    return value


def share(value: ir.Value) -> ir.Value:
    """Have what is made of tokens be the same for all layers, which may look it up in tables; returns it."""
    node = value.producer()
    assert node is not None
    node.metadata_props[_SHARED] = "true"
    return value


def is_shared(node: ir.Node) -> bool:
    """Whether `share` made what the node computes a matter of all layers."""
    return _SHARED in node.metadata_props


def constant_where(graph: ir.Graph, condition: ir.Value, value: ir.Value) -> ir.Value:
    """The same value, through which no gradient flows where the condition holds."""
    constant = detach(append(graph, "Identity", [value], shape=value.shape))
    return append(graph, "Where", [condition, constant, value], shape=value.shape)


def is_detached(node: ir.Node) -> bool:
    """Whether `detach` made what the node computes a constant to gradients."""
    return _DETACHED in node.metadata_props


def is_behind(node: ir.Node) -> bool:
    """Whether `put_behind` made this node: it stands behind its first operand."""
    return _BEHIND in node.metadata_props


def in_front(value: ir.Value) -> ir.Value:
    """What everything read that reads `value`, before `put_behind`."""
    while (node := value.producer()) is not None and is_behind(node):
        first = node.inputs[0]
        assert first is not None
        value = first
    return value


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Have everything that reads `old` read `new`, which is the graph's output in its place and has its name
    there."""
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        old.name, new.name = None, name


def rename_axes(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Rename symbolic axes everywhere; an expression of several (`s1 + s2`) is renamed part by part."""

    def rename(value: ir.Value) -> None:
        if value.shape is None:
            return
        dims: list[int | str | None] = []
        for dim in value.shape:
            if isinstance(dim, int) or dim.value is None:
                dims.append(dim if isinstance(dim, int) else None)
            else:
                dims.append(" ".join(names.get(part, part) for part in dim.value.split(" ")))
        value.shape = ir.Shape(dims)

    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        rename(value)


def transposed_input(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """An input that holds `value` transposed, and in the graph the way back."""
    assert value.shape is not None
    rows, columns = value.shape.numpy()
    turned = ir.Value(name=value.name, shape=ir.Shape([columns, rows]), type=value.type)
    back = ir.node("Transpose", [turned], {"perm": [1, 0]})
    back.outputs[0].shape, back.outputs[0].type = value.shape, value.type
    value.name = f"{value.name}.turned"
    value.replace_all_uses_with(back.outputs[0])
    graph.insert_before(next(iter(graph)), back)
    return turned
