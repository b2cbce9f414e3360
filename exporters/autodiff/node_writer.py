"""Writes ONNX nodes and constants into a graph, each distinct one once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

# Equal inputs do not make two of these nodes equal.
_RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


class NodeWriter:
    """Appends nodes to a graph and remembers them.

    A node with the same operator, inputs and attributes as an existing one, of the forward pass or emitted
    before, is not emitted again: its output is returned. Output types and shapes are set where known.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.metadata_props: dict[str, str] = {}
        self._emitted: dict[tuple[Any, ...], Sequence[ir.Value]] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._appended: list[ir.Node] = []
        self._names = {value.name for value in [*graph.inputs, *graph.initializers.values()]}
        self._counter = 0
        for node in graph:
            self._names.update(output.name for output in node.outputs)
            if node.op_type not in _RANDOM and not any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
            ):
                self._emitted.setdefault(_node_key(node), node.outputs)

    # ---- nodes -----------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Emits a node with one output, of the type and shape of `like` or of `dtype` and `shape`."""
        if like is not None:
            dtype, shape = like.dtype, like.shape
        return self.ops(op_type, *inputs, domain=domain, outputs=[(dtype, shape)], **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: Sequence[tuple[ir.DataType | None, ir.Shape | None]],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Emits a node whose outputs have the given types and shapes."""
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            outputs=[ir.Value(name=self.new_name(op_type)) for _ in outputs],
        )
        key = _node_key(node)
        existing = self._emitted.get(key)
        if existing is not None and len(existing) >= len(outputs):
            for position in range(len(inputs)):
                node.replace_input_with(position, None)
            return existing
        for value, (dtype, shape) in zip(node.outputs, outputs, strict=True):
            if dtype is not None:
                value.dtype = dtype
            value.shape = None if shape is None else shape.copy()
        node.name = f"node_{node.outputs[0].name}"
        node.metadata_props.update(self.metadata_props)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        self.graph.append(node)
        self._appended.append(node)
        self._emitted[key] = node.outputs
        return node.outputs

    def new_name(self, stem: str) -> str:
        """A value name that the graph does not have."""
        while True:
            name = f"backward_{stem}_{self._counter}"
            self._counter += 1
            if name not in self._names:
                self._names.add(name)
                return name

    def remove_unused(self, keep: Iterable[ir.Value]) -> None:
        """Removes emitted nodes and constants that lead to none of the values to keep."""
        kept = set(keep)
        for node in reversed(self._appended):
            if not any(output.uses() or output in kept for output in node.outputs):
                self.graph.remove(node, safe=True)
        for value in self._constants.values():
            if not value.uses() and value not in kept and value.name is not None:
                del self.graph.initializers[value.name]

    # ---- constants and facts ---------------------------------------------------------------------

    def constant(self, data: Any, dtype: ir.DataType) -> ir.Value:
        """An initializer with these values; equal ones are shared."""
        array = np.asarray(data, dtype=dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        value = self._constants.get(key)
        if value is None:
            stem = "constant"
            if array.ndim:  # a large one is kept in one file for all graphs of a bundle, by name
                told = f"{dtype} {array.shape} ".encode() + array.tobytes()
                stem = f"constant_{hashlib.sha256(told).hexdigest()[:12]}"
            name = self.new_name(stem)
            value = self.initializer(ir.Tensor(array, dtype, name=name))
            self._constants[key] = value
        return value

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Registers a tensor as an initializer under its name."""
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def reinterpreted(self, packed: ir.Value, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """An initializer with the same bytes as another one, read as another type and shape; not copied."""
        if packed.dtype == dtype and packed.shape == shape:
            return packed
        tensor = packed.const_value
        if tensor is None:
            raise ExportError(
                f"{packed.name!r} is not an initializer, so its bytes cannot be read as {dtype}"
            )
        key = (id(tensor), dtype, tuple(shape))
        value = self._constants.get(key)
        if value is None:
            value = self.initializer(
                _reinterpret(tensor, dtype, shape, self.new_name(f"{packed.name}_{dtype}"))
            )
            self._constants[key] = value
        return value

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """A constant of rank 0 with the element type of `like`."""
        return self.constant(number, self.dtype(like))

    def int64(self, values: int | Sequence[int]) -> ir.Value:
        """An int64 constant."""
        return self.constant(values, ir.DataType.INT64)

    def constant_of(self, value: ir.Value | None) -> np.ndarray[Any, Any] | None:
        """The number a value is known to have, or None."""
        if value is None or value.is_graph_input():
            return None
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()

    def shape(self, value: ir.Value) -> ir.Shape:
        """The shape of a value, of known rank.

        Raises:
            ExportError: when the rank is unknown.
        """
        if value.shape is None:
            raise ExportError(
                f"the gradient needs the rank of value {value.name!r} ({_origin(value)}), which is unknown: "
                "run shape inference on the graph before differentiating it"
            )
        return value.shape

    def rank(self, value: ir.Value) -> int:
        """The number of axes of a value."""
        return self.shape(value).rank()

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The element type of a value.

        Raises:
            ExportError: when it is unknown.
        """
        if value.dtype is None:
            raise ExportError(
                f"the gradient needs the element type of value {value.name!r} ({_origin(value)}), which is "
                "unknown: run type inference on the graph before differentiating it"
            )
        return value.dtype

    def shape_of(self, value: ir.Value) -> ir.Value:
        """The run-time shape of a value, int64 `[rank]`: a constant where it is static."""
        if value.shape is not None and value.shape.is_static():
            return self.int64(list(value.shape.numpy()))
        rank = None if value.shape is None else ir.Shape([value.shape.rank()])
        return self.op("Shape", value, dtype=ir.DataType.INT64, shape=rank)

    def dim_of(self, value: ir.Value, axis: int) -> ir.Value:
        """The run-time size of one axis (non-negative), int64 `[1]`."""
        dim = self.shape(value)[axis]
        if isinstance(dim, int):
            return self.int64([dim])
        return self.op("Shape", value, dtype=ir.DataType.INT64, shape=ir.Shape([1]), start=axis, end=axis + 1)


def _origin(value: ir.Value) -> str:
    node = value.producer()
    return "a graph input" if node is None else f"made by {node.op_type} node {node.name!r}"


def _node_key(node: ir.Node) -> tuple[Any, ...]:
    attributes = tuple(sorted((name, _attribute_key(attr)) for name, attr in node.attributes.items()))
    return (node.domain, node.op_type, tuple(id(value) for value in node.inputs), attributes)


def _attribute_key(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype}{tensor.shape}{tensor.tobytes()!r}"
    if isinstance(attribute.value, Sequence) and not isinstance(attribute.value, str):
        return repr(tuple(attribute.value))
    return repr(attribute.value)


def _reinterpret(
    tensor: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
    flat = tensor.numpy().reshape(-1).view(np.uint8)
    if dtype.bitwidth < 8:
        return ir.PackedTensor(flat, dtype, shape=ir.Shape(shape), name=name)
    return ir.Tensor(flat.view(dtype.numpy()).reshape(shape), dtype, name=name)
