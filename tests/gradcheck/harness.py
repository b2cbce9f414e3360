"""Builds one-node graphs, differentiates them, and runs them in onnxruntime or onnx's reference evaluator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state

from edgepeft.exporters.autodiff import differentiate
from edgepeft.exporters.graph import MICROSOFT

from .reference_ops import REFERENCE_OPS

Array = np.ndarray[Any, Any]
_IN_REFERENCE = {op.__name__ for op in REFERENCE_OPS}
_NO_KERNEL = (
    onnxruntime_pybind11_state.NotImplemented,
    onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime_pybind11_state.Fail,
)


@dataclass(frozen=True)
class Case:
    """One operator with inputs, and the same function in PyTorch.

    Attributes:
        op: `Operator` or `domain::Operator`.
        inputs: float64 arrays are differentiable candidates; arrays of other types are fed as they are.
        function: the operator on torch tensors, returning one tensor or several.
        wrt: positions of the inputs to differentiate by; None stands for all float64 ones.
        constants: positions of inputs that are initializers instead of graph inputs.
        float64: whether the operator exists in float64.
        linear: whether the operator is linear in each input, so that its central differences are exact for
            any step. One that exists in float32 only has no precise ones otherwise.
        static_inputs: positions of inputs whose shape is always static.
        symbolic_axes: axes that are not static in the variant with symbolic shapes; None stands for all.
        tolerance64: of the float64 gradients; float attributes are rounded to float32 by ONNX.
        tolerance: of the float32 gradients, relative to the largest element.
        label: told apart in test names.
    """

    op: str
    inputs: tuple[Array | None, ...]
    function: Callable[..., Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    wrt: tuple[int, ...] | None = None
    constants: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 23
    float64: bool = True
    linear: bool = True
    static_inputs: tuple[int, ...] = ()
    symbolic_axes: tuple[int, ...] | None = None
    tolerance64: float = 1e-9
    tolerance: float = 2e-5
    label: str = ""

    @property
    def domain(self) -> str:
        return self.op.rpartition("::")[0]

    @property
    def op_type(self) -> str:
        return self.op.rpartition("::")[2]

    @property
    def differentiable(self) -> tuple[int, ...]:
        if self.wrt is not None:
            return self.wrt
        return tuple(i for i, x in enumerate(self.inputs) if x is not None and x.dtype == np.float64)

    def __str__(self) -> str:
        shapes = ",".join("-" if x is None else "x".join(map(str, x.shape)) or "scalar" for x in self.inputs)
        attributes = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return "-".join(filter(None, [self.op_type, self.label, shapes, attributes])).replace(" ", "")


def subsets(positions: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every non-empty choice of wanted inputs."""
    for size in range(len(positions), 0, -1):
        yield from itertools.combinations(positions, size)


@dataclass
class Differentiated:
    """A model with outputs `loss` and one gradient for each wanted input."""

    model: ir.Model
    forward_nodes: set[ir.Node]
    wanted: tuple[int, ...]

    @property
    def backward_nodes(self) -> list[ir.Node]:
        return [node for node in self.model.graph if node not in self.forward_nodes]


def projections(outputs: Sequence[Array]) -> list[Array | None]:
    """Fixed random weights that turn the floating-point outputs into one number."""
    rng = np.random.default_rng(7)
    return [
        rng.uniform(0.5, 1.5, y.shape) * rng.choice([-1, 1], y.shape)
        if y.dtype in (np.float32, np.float64)
        else None
        for y in outputs
    ]


def build(
    case: Case, dtype: type, outputs: Sequence[Array], *, static: bool
) -> tuple[ir.Model, list[ir.Value]]:
    """The node of `case` with loss = Σ projection · output; shapes are static, or of unknown dimensions."""

    def shape_of(array: Array, position: int | None = None) -> ir.Shape:
        axes = range(array.ndim) if case.symbolic_axes is None else case.symbolic_axes
        if static or position in case.static_inputs:
            return ir.Shape(array.shape)
        return ir.Shape([None if i in axes else d for i, d in enumerate(array.shape)])

    graph = ir.Graph([], [], nodes=[], opset_imports={"": case.opset, MICROSOFT: 1}, name="case")
    values: list[ir.Value | None] = []
    for i, array in enumerate(case.inputs):
        if array is None:
            values.append(None)
            continue
        array = array.astype(dtype) if array.dtype == np.float64 else array
        tensor = ir.tensor(array, name=f"x{i}")
        value = ir.Value(name=f"x{i}", shape=shape_of(array, i), type=ir.TensorType(tensor.dtype))
        if i in case.constants:
            value.const_value = tensor
            value.shape = ir.Shape(array.shape)
            graph.register_initializer(value)
        else:
            graph.inputs.append(value)
        values.append(value)
    node = ir.node(case.op_type, values, dict(case.attributes), domain=case.domain, num_outputs=case.outputs)
    graph.append(node)
    float_type = ir.DataType.from_numpy(np.dtype(dtype))
    terms = []
    for i, (value, array, weights) in enumerate(
        zip(node.outputs, outputs, projections(outputs), strict=True)
    ):
        value.shape = shape_of(array)
        value.dtype = float_type if weights is not None else ir.DataType.from_numpy(array.dtype)
        if weights is None:
            continue
        weight = ir.Value(
            name=f"projection{i}",
            shape=ir.Shape(array.shape),
            type=ir.TensorType(float_type),
            const_value=ir.tensor(weights.astype(dtype), name=f"projection{i}"),
        )
        graph.register_initializer(weight)
        terms.append(_append(graph, "Mul", [value, weight], float_type, value.shape))
        terms[-1] = _append(graph, "ReduceSum", [terms[-1]], float_type, ir.Shape([]), keepdims=0)
    loss = terms[0]
    for term in terms[1:]:
        loss = _append(graph, "Add", [loss, term], float_type, ir.Shape([]))
    loss.name = "loss"
    graph.outputs.append(loss)
    return ir.Model(graph, ir_version=11), [value for value in values if value is not None]


def _append(
    graph: ir.Graph,
    op: str,
    inputs: list[ir.Value],
    dtype: ir.DataType,
    shape: ir.Shape | None,
    **attributes: Any,
) -> ir.Value:
    value = ir.Value(shape=shape, type=ir.TensorType(dtype))
    graph.append(ir.node(op, inputs, attributes, outputs=[value]))
    return value


def differentiate_case(
    case: Case, dtype: type, outputs: Sequence[Array], wanted: tuple[int, ...], *, static: bool
) -> Differentiated:
    """Builds the case and appends its backward pass."""
    model, _ = build(case, dtype, outputs, static=static)
    graph = model.graph
    forward = set(graph)
    values = {value.name: value for value in [*graph.inputs, *graph.initializers.values()]}
    primals = [values[f"x{i}"] for i in wanted]
    cotangents = differentiate(graph, graph.outputs[0], primals)
    for i, primal in zip(wanted, primals, strict=True):
        # Through an Identity, because one value may be the cotangent of several inputs.
        cotangent = cotangents[primal]
        assert cotangent.dtype == primal.dtype
        name = f"gradient{i}"
        output = ir.Value(name=name, shape=cotangent.shape, type=ir.TensorType(primal.dtype))
        node = ir.node("Identity", [cotangent], outputs=[output])
        graph.append(node)
        forward.add(node)
        graph.outputs.append(output)
    return Differentiated(model, forward, wanted)


def run(model: ir.Model, case: Case, dtype: type) -> list[Array]:
    """Runs a model in onnxruntime, or in the reference evaluator where onnxruntime has no float64 kernel."""
    proto = ir.to_proto(model)
    feeds = {
        f"x{i}": x.astype(dtype) if x.dtype == np.float64 else x
        for i, x in enumerate(case.inputs)
        if x is not None and i not in case.constants
    }
    return evaluator(proto, dtype)(feeds)


def _reference(proto: onnx.ModelProto) -> Callable[[dict[str, Array]], list[Array]]:
    reference = onnx.reference.ReferenceEvaluator(proto, new_ops=REFERENCE_OPS)
    return lambda feeds: list(reference.run(None, feeds))


def evaluator(proto: onnx.ModelProto, dtype: type) -> Callable[[dict[str, Array]], list[Array]]:
    """A function from feeds to outputs."""
    if dtype is np.float64 and any(node.op_type in _IN_REFERENCE for node in proto.graph.node):
        return _reference(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, disabled_optimizers=["ConstantFolding"]
        )
    except _NO_KERNEL:
        if dtype is np.float32:
            raise
        return _reference(proto)
    names = {value.name for value in session.get_inputs()}
    return lambda feeds: session.run(None, {k: v for k, v in feeds.items() if k in names})


def forward_function(
    case: Case, dtype: type, outputs: Sequence[Array]
) -> Callable[[Sequence[Array | None]], float]:
    """loss(inputs), evaluated by the operator itself."""
    model, _ = build(case, dtype, outputs, static=False)
    call = evaluator(ir.to_proto(model), dtype)
    constants = set(case.constants)

    def loss(inputs: Sequence[Array | None]) -> float:
        feeds = {
            f"x{i}": x.astype(dtype) if x.dtype == np.float64 else x
            for i, x in enumerate(inputs)
            if x is not None and i not in constants
        }
        return float(call(feeds)[0])

    return loss


def torch_outputs(case: Case) -> tuple[list[Array], list[Array]]:
    """Outputs of the case in PyTorch, and the gradients of Σ projection · output, in float64."""
    tensors = [None if x is None else torch.tensor(x) for x in case.inputs]
    for i in case.differentiable:
        tensor = tensors[i]
        assert tensor is not None
        tensor.requires_grad_(True)
    result = case.function(*tensors)
    results = list(result) if isinstance(result, tuple | list) else [result]
    arrays = [y.detach().numpy() for y in results]
    loss = sum(
        (y * torch.tensor(w)).sum()
        for y, w in zip(results, projections(arrays), strict=True)
        if w is not None
    )
    assert isinstance(loss, torch.Tensor)
    wanted = [tensors[i] for i in case.differentiable]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    return arrays, [
        np.zeros(x.shape) if g is None else g.numpy()  # type: ignore[union-attr]
        for g, x in zip(gradients, wanted, strict=True)
    ]


def central_differences(case: Case, outputs: Sequence[Array]) -> list[Array]:
    """The gradients of the operator itself, by moving one element at a time."""
    dtype, step = (np.float64, 1e-5) if case.float64 else (np.float32, 1.0 if case.linear else 1e-2)
    loss = forward_function(case, dtype, outputs)
    gradients = []
    for i in case.differentiable:
        base = case.inputs[i]
        assert base is not None
        gradient = np.zeros(base.shape)
        for index in np.ndindex(base.shape):
            sides = []
            for sign in (1, -1):
                moved = base.copy()
                moved[index] += sign * step
                inputs = [moved if j == i else x for j, x in enumerate(case.inputs)]
                sides.append(loss(inputs))
            gradient[index] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return gradients
