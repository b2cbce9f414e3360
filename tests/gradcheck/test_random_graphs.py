"""Small random graphs, differentiated and compared with PyTorch's autograd.

What single-operator tests cannot show: accumulation over branches, values that are used in several ways,
broadcasting chains, and the sharing of helper nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepeft.exporters.autodiff import differentiate

from .harness import evaluator

SHAPES: list[tuple[int, ...]] = [(2, 3), (1, 3), (2, 1), (3,), (1,), ()]
FLOAT = ir.DataType.FLOAT


@dataclass
class Node:
    """A value in both worlds."""

    value: ir.Value
    tensor: torch.Tensor


UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Neg": torch.neg,
    "Sin": torch.sin,
    "Softplus": torch.nn.functional.softplus,
    "Identity": torch.clone,
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
}


class Graph:
    """Grows an ONNX graph and the same computation in PyTorch."""

    def __init__(self, symbolic: bool) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="random")
        self.symbolic = symbolic
        self.feeds: dict[str, Any] = {}

    def input(self, shape: tuple[int, ...]) -> Node:
        name = f"x{len(self.feeds)}"
        array = np.random.default_rng(len(self.feeds)).uniform(-1, 1, shape).astype(np.float32)
        self.feeds[name] = array
        value = ir.Value(name=name, shape=self.shape(shape), type=ir.TensorType(FLOAT))
        self.graph.inputs.append(value)
        return Node(value, torch.tensor(array, dtype=torch.float64, requires_grad=True))

    def shape(self, shape: tuple[int, ...]) -> ir.Shape:
        return ir.Shape([None] * len(shape) if self.symbolic else shape)

    def constant(self, values: list[int]) -> ir.Value:
        name = f"c{len(self.graph.initializers)}"
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def op(self, op: str, inputs: list[ir.Value], tensor: torch.Tensor, **attributes: Any) -> Node:
        value = ir.Value(shape=self.shape(tuple(tensor.shape)), type=ir.TensorType(FLOAT))
        self.graph.append(ir.node(op, inputs, attributes, outputs=[value]))
        return Node(value, tensor)


def _grow(draw: st.DrawFn, g: Graph, nodes: list[Node]) -> Node:
    """One more value, made from values that exist."""
    a, b = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
    kinds = ["unary", "binary"]
    if a.tensor.ndim:
        kinds += ["reduce", "softmax", "concat", "slice", "gather"]
    if a.tensor.ndim == 2:
        kinds += ["transpose", "matmul", "norm"]
    kind = draw(st.sampled_from(kinds))
    if kind == "binary":
        op = draw(st.sampled_from(sorted(BINARY)))
        try:
            tensor = BINARY[op](a.tensor, b.tensor)
        except RuntimeError:
            b = a
            tensor = BINARY[op](a.tensor, a.tensor)
        return g.op(op, [a.value, b.value], tensor)
    if kind == "reduce":
        axis, keep = draw(st.integers(0, a.tensor.ndim - 1)), draw(st.integers(0, 1))
        tensor = a.tensor.mean(axis, keepdim=bool(keep))
        return g.op("ReduceMean", [a.value, g.constant([axis])], tensor, keepdims=keep)
    if kind == "softmax":
        return g.op("Softmax", [a.value], torch.softmax(a.tensor, -1), axis=-1)
    if kind == "concat":
        return g.op("Concat", [a.value, a.value], torch.cat([a.tensor, a.tensor], -1), axis=-1)
    if kind == "slice":
        tensor = a.tensor[..., :1]
        return g.op("Slice", [a.value, g.constant([0]), g.constant([1]), g.constant([-1])], tensor)
    if kind == "gather":
        size = a.tensor.shape[-1]
        picks = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3))
        return g.op("Gather", [a.value, g.constant(picks)], a.tensor[..., picks], axis=-1)
    if kind == "transpose":
        return g.op("Transpose", [a.value], a.tensor.T, perm=[1, 0])
    if kind == "matmul":
        turned = g.op("Transpose", [a.value], a.tensor.T, perm=[1, 0])
        return g.op("MatMul", [a.value, turned.value], a.tensor @ turned.tensor)
    if kind == "norm":
        scale = g.op("ReduceSum", [a.value, g.constant([0])], a.tensor.sum(0), keepdims=0)
        mean = a.tensor.mean(-1, keepdim=True)
        variance = ((a.tensor - mean) ** 2).mean(-1, keepdim=True)
        tensor = (a.tensor - mean) / torch.sqrt(variance + 0.1) * scale.tensor
        return g.op("LayerNormalization", [a.value, scale.value], tensor, axis=-1, epsilon=0.1)
    op = draw(st.sampled_from(sorted(UNARY)))
    return g.op(op, [a.value], UNARY[op](a.tensor))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, list[Node], Node]:
    """A graph of up to twelve operators, its inputs, and its scalar loss."""
    g = Graph(symbolic=draw(st.booleans()))
    inputs = [g.input(draw(st.sampled_from(SHAPES))) for _ in range(draw(st.integers(1, 3)))]
    nodes = list(inputs)
    for _ in range(draw(st.integers(1, 12))):
        node = _grow(draw, g, nodes)
        # Bounded, so that float32 can be compared after many products.
        nodes.append(g.op("Tanh", [node.value], torch.tanh(node.tensor)) if draw(st.booleans()) else node)
    total = nodes[-1]
    for node in nodes:
        if not node.value.uses() and node is not total:
            summed = g.op("ReduceSum", [node.value], node.tensor.sum(), keepdims=0)
            total = g.op("Add", [total.value, summed.value], total.tensor + summed.tensor)
    return g, inputs, g.op("ReduceMean", [total.value], total.tensor.mean(), keepdims=0)


@given(graphs())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_graphs_agree_with_torch(drawn: tuple[Graph, list[Node], Node]) -> None:
    g, inputs, loss = drawn
    expected = torch.autograd.grad(loss.tensor, [node.tensor for node in inputs])
    before = len(g.graph)
    cotangents = differentiate(g.graph, loss.value, [node.value for node in inputs])
    for node in list(g.graph)[before:]:
        assert any(output.uses() or output in cotangents.values() for output in node.outputs), (
            f"{node} is dead"
        )
    for node in inputs:
        output = ir.Value(shape=node.value.shape, type=ir.TensorType(FLOAT))
        g.graph.append(ir.node("Identity", [cotangents[node.value]], outputs=[output]))
        g.graph.outputs.append(output)
    got = evaluator(ir.to_proto(ir.Model(g.graph, ir_version=11)), np.float32)(g.feeds)
    for gradient, reference in zip(got, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        assert gradient.shape == tuple(reference.shape)
        assert np.abs(gradient - reference.numpy()).max() <= 1e-4 * scale
