"""Emits ONNX nodes into a graph, each distinct computation once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

from .registry import MICROSOFT
from .shapes import (
    broadcast_shapes,
    normalize_axes,
    plan_unbroadcast,
    reduced_shape,
    reshape_target,
    same_shape,
)

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


class Emitter:
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
            name = self.new_name("constant")
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

    def element_count(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The number of elements along some axes (non-negative), as a scalar of the type of `value`."""
        dims = [self.shape(value)[axis] for axis in axes]
        known = [dim for dim in dims if isinstance(dim, int)]
        if len(known) == len(dims):
            return self.scalar(math.prod(known), value)
        sizes = self.op(
            "Gather",
            self.shape_of(value),
            self.int64(axes),
            dtype=ir.DataType.INT64,
            shape=ir.Shape([len(axes)]),
        )
        count = self.op("ReduceProd", sizes, dtype=ir.DataType.INT64, shape=ir.Shape([]), keepdims=0)
        return self.cast(count, self.dtype(value))

    # ---- arithmetic ------------------------------------------------------------------------------

    def binary(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """An elementwise operator of two broadcast inputs of one type."""
        return self.op(op_type, a, b, dtype=a.dtype, shape=broadcast_shapes(a.shape, b.shape))

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a + b."""
        return self.binary("Add", a, b)

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a − b."""
        return self.binary("Sub", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a · b; multiplying by a constant scalar 1 emits nothing."""
        for factor, other in ((a, b), (b, a)):
            if self.is_one(factor) and other.shape is not None:
                return other
        return self.binary("Mul", a, b)

    def div(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a / b."""
        return self.binary("Div", a, b)

    def scale(self, a: ir.Value, factor: float) -> ir.Value:
        """a · factor."""
        return self.mul(a, self.scalar(factor, a))

    def unary(self, op_type: str, a: ir.Value, **attributes: Any) -> ir.Value:
        """An elementwise operator of one input."""
        return self.op(op_type, a, like=a, **attributes)

    def neg(self, a: ir.Value) -> ir.Value:
        """−a."""
        return self.unary("Neg", a)

    def is_one(self, value: ir.Value) -> bool:
        """Whether a value is a constant scalar 1."""
        if value.shape is None or value.shape.rank() != 0:
            return False
        number = self.constant_of(value)
        return number is not None and bool(number == 1)

    def zeros_like(self, value: ir.Value) -> ir.Value:
        """Zeros of the type and shape of `value`."""
        return self.op("Expand", self.scalar(0, value), self.shape_of(value), like=value)

    def where(self, condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """`a` where the condition holds, else `b`."""
        shape = broadcast_shapes(condition.shape, a.shape, b.shape)
        return self.op("Where", condition, a, b, dtype=a.dtype, shape=shape)

    def compare(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """A comparison of two broadcast inputs, boolean."""
        return self.op(op_type, a, b, dtype=ir.DataType.BOOL, shape=broadcast_shapes(a.shape, b.shape))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, shape=value.shape, to=dtype.value)

    # ---- reductions ------------------------------------------------------------------------------

    def reduce(self, op_type: str, value: ir.Value, axes: Sequence[int], *, keepdims: bool) -> ir.Value:
        """A reduction over constant axes; nothing where there are none."""
        if not axes:
            return value
        axes = normalize_axes(axes, self.rank(value))
        shape = reduced_shape(value.shape, axes, keepdims=keepdims)
        return self.op(
            op_type, value, self.int64(axes), dtype=value.dtype, shape=shape, keepdims=int(keepdims)
        )

    def sum(self, value: ir.Value, axes: Sequence[int], *, keepdims: bool = True) -> ir.Value:
        """The sum over constant axes."""
        return self.reduce("ReduceSum", value, axes, keepdims=keepdims)

    def unbroadcast(self, cotangent: ir.Value, primal: ir.Value) -> ir.Value:
        """Sums a cotangent over the axes along which its primal was broadcast.

        Nothing is emitted where static shapes prove that nothing was broadcast; where they leave it open, the
        axes are found at run time.
        """
        if same_shape(cotangent.shape, primal.shape):
            return cotangent
        plan = plan_unbroadcast(self.shape(cotangent), self.shape(primal))
        if plan.uncertain:
            return self._unbroadcast_at_run_time(cotangent, primal)
        leading = range(plan.leading)
        if not plan.leading:
            return self.sum(cotangent, plan.inner)
        total = self.sum(cotangent, [*leading, *plan.inner], keepdims=False)
        return self.unsqueeze(total, [axis - plan.leading for axis in plan.inner])

    def _unbroadcast_at_run_time(self, cotangent: ir.Value, primal: ir.Value) -> ir.Value:
        target = self.shape_of(primal)
        rank = self.rank(cotangent)
        padded = target
        if missing := rank - self.rank(primal):
            padded = self.concat([self.int64([1] * missing), target], axis=0)
        is_one = self.compare("Equal", padded, self.int64(1))
        found = self.op("NonZero", is_one, dtype=ir.DataType.INT64, shape=ir.Shape([1, None]))
        axes = self.op("Squeeze", found, self.int64([0]), dtype=ir.DataType.INT64, shape=ir.Shape([None]))
        total = self.op(
            "ReduceSum",
            cotangent,
            axes,
            dtype=cotangent.dtype,
            shape=ir.Shape([None] * rank),
            keepdims=1,
            noop_with_empty_axes=1,
        )
        return (
            self.op("Reshape", total, target, like=primal, allowzero=1)
            if missing
            else self._retyped(total, primal)
        )

    def _retyped(self, value: ir.Value, primal: ir.Value) -> ir.Value:
        value.shape = primal.shape.copy() if primal.shape is not None else None
        return value

    # ---- shapes ----------------------------------------------------------------------------------

    def reshape_like(self, value: ir.Value, primal: ir.Value) -> ir.Value:
        """`value` in the shape of `primal`."""
        if same_shape(value.shape, primal.shape):
            return value
        spec = reshape_target(value.shape, primal.shape)
        if spec is not None:
            return self.op("Reshape", value, self.int64(spec), like=primal)
        return self.op("Reshape", value, self.shape_of(primal), like=primal, allowzero=1)

    def expand_like(self, value: ir.Value, primal: ir.Value) -> ir.Value:
        """`value` broadcast to the shape of `primal`."""
        if same_shape(value.shape, primal.shape):
            return value
        return self.op("Expand", value, self.shape_of(primal), like=primal)

    def unsqueeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Inserts axes of size 1 at these positions (non-negative, of the result)."""
        if not axes:
            return value
        shape = None
        if value.shape is not None:
            dims = list(value.shape)
            for axis in sorted(axes):
                dims.insert(axis, 1)
            shape = ir.Shape(dims)
        return self.op("Unsqueeze", value, self.int64(sorted(axes)), dtype=value.dtype, shape=shape)

    def squeeze(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Removes axes of size 1 (non-negative)."""
        if not axes:
            return value
        shape = reduced_shape(value.shape, axes, keepdims=False)
        return self.op("Squeeze", value, self.int64(sorted(axes)), dtype=value.dtype, shape=shape)

    def transpose(self, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """Permutes the axes."""
        if list(permutation) == list(range(len(permutation))):
            return value
        shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in permutation])
        return self.op("Transpose", value, dtype=value.dtype, shape=shape, perm=list(permutation))

    def swap_last(self, value: ir.Value) -> ir.Value:
        """Transposes the last two axes."""
        rank = self.rank(value)
        return self.transpose(value, [*range(rank - 2), rank - 1, rank - 2])

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Concatenates along an axis (non-negative)."""
        if len(values) == 1:
            return values[0]
        shape = None
        if all(value.shape is not None for value in values):
            dims = list(self.shape(values[0]))
            sizes = [self.shape(value)[axis] for value in values]
            known = [size for size in sizes if isinstance(size, int)]
            dims[axis] = sum(known) if len(known) == len(sizes) else ir.SymbolicDim(None)
            shape = ir.Shape(dims)
        return self.op("Concat", *values, dtype=values[0].dtype, shape=shape, axis=axis)

    # ---- products --------------------------------------------------------------------------------

    def matmul(
        self, a: ir.Value, b: ir.Value, *, trans_a: bool = False, trans_b: bool = False, alpha: float = 1.0
    ) -> ir.Value:
        """`alpha · op(a) @ op(b)` for inputs of rank 2 or more, transposing their last two axes.

        onnxruntime's FusedMatMul does it in one node without a transposed copy; it exists for float32 only.
        """
        a_shape, b_shape = self.shape(a), self.shape(b)
        rows = a_shape[-1] if trans_a else a_shape[-2]
        columns = b_shape[-2] if trans_b else b_shape[-1]
        batch = broadcast_shapes(ir.Shape(a_shape[:-2]), ir.Shape(b_shape[:-2]))
        shape = None if batch is None else ir.Shape([*batch, rows, columns])
        plain = not trans_a and not trans_b and alpha == 1.0
        if self.dtype(a) == ir.DataType.FLOAT and not plain:
            attributes: dict[str, Any] = {}
            if trans_a:
                attributes["transA"] = 1
            if trans_b:
                attributes["transB"] = 1
            if alpha != 1.0:
                attributes["alpha"] = float(alpha)
            return self.op("FusedMatMul", a, b, domain=MICROSOFT, dtype=a.dtype, shape=shape, **attributes)
        left = self.swap_last(a) if trans_a else a
        right = self.swap_last(b) if trans_b else b
        product = self.op("MatMul", left, right, dtype=a.dtype, shape=shape)
        return product if alpha == 1.0 else self.scale(product, alpha)


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
