"""What is computed, what is refused, and what the errors say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepeft.errors import ExportError, UnsupportedOperatorError
from edgepeft.exporters.autodiff import differentiate

from .harness import evaluator

FLOAT = ir.DataType.FLOAT


class Builder:
    """A graph under construction."""

    def __init__(self, opset: int = 23) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1}, name="test")

    def input(self, name: str, shape: Sequence[int | str | None], dtype: ir.DataType = FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        shape: Sequence[int | str | None] | None,
        dtype: ir.DataType = FLOAT,
        domain: str = "",
        scope: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        value = ir.Value(shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=[value])
        if scope:
            node.metadata_props["namespace"] = scope
        self.graph.append(node)
        return value

    def loss(self, value: ir.Value) -> ir.Value:
        return self.op("ReduceSum", value, shape=[], keepdims=0)

    def run(self, loss: ir.Value, gradients: Sequence[ir.Value], feeds: dict[str, Any]) -> list[Any]:
        self.graph.outputs.append(loss)
        for gradient in gradients:
            self.graph.outputs.append(self.op("Identity", gradient, shape=list(gradient.shape or [])))
        proto = ir.to_proto(ir.Model(self.graph, ir_version=11))
        return evaluator(proto, np.float32)(feeds)


def operators(graph: ir.Graph, after: int) -> Counter[str]:
    return Counter(node.op_type for node in list(graph)[after:])


def test_all_missing_operators_are_named_at_once_with_their_scope() -> None:
    b = Builder()
    x = b.input("x", [2, 2])
    y = b.op("Det", x, shape=[], scope="model/first: torch.det")
    z = b.op("Magic", x, shape=[2, 2], domain="my.domain", scope="model/second")
    loop = b.op("ImageDecoder", x, shape=[2, 2])
    total = b.op("Sum", y, z, loop, shape=[2, 2])
    before = len(list(b.graph))
    with pytest.raises(UnsupportedOperatorError) as caught:
        differentiate(b.graph, b.loss(total), [x])
    message = str(caught.value)
    assert "3 node(s)" in message
    assert "ai.onnx::Det version 22" in message
    assert "in model/first: torch.det: no rule" in message
    assert "my.domain::Magic version 1" in message
    assert "in model/second: no rule" in message
    assert "ai.onnx::ImageDecoder" in message
    assert len(list(b.graph)) == before + 1, "the graph was changed although it cannot be differentiated"


def test_missing_operators_off_the_path_do_not_matter() -> None:
    b = Builder()
    x, frozen = b.input("x", [2]), b.input("frozen", [2])
    b.op("Det", x, shape=[2])
    y = b.op("Mul", x, b.op("Magic", frozen, shape=[2], domain="my.domain"), shape=[2])
    differentiate(b.graph, b.loss(y), [x])


def test_an_input_without_cotangent_is_refused_not_treated_as_constant() -> None:
    b = Builder()
    x, angles = b.input("x", [1, 2, 3, 4]), b.input("angles", [1, 3, 2])
    y = b.op(
        "RotaryEmbedding",
        x,
        b.op("Cos", angles, shape=[1, 3, 2]),
        b.op("Sin", angles, shape=[1, 3, 2]),
        shape=[1, 2, 3, 4],
    )
    loss = b.loss(y)
    differentiate(b.graph, loss, [x])
    with pytest.raises(
        UnsupportedOperatorError, match=r"RotaryEmbedding.*refused because.* no cotangent for input 1"
    ):
        differentiate(b.graph, loss, [angles])


def test_an_operator_version_that_nobody_has_read_is_missing() -> None:
    b = Builder(opset=28)
    x = b.input("x", [2, 3])
    loss = b.op("ReduceLogSumExp", x, shape=[], keepdims=0)
    with pytest.raises(UnsupportedOperatorError, match=r"version 28.*no rule for this version.*known: 18-18"):
        differentiate(b.graph, loss, [x])


def test_a_value_without_influence_is_named() -> None:
    b = Builder()
    x, unused, stepped = b.input("x", [2]), b.input("unused", [2]), b.input("stepped", [2])
    y = b.op("Add", x, b.op("Floor", stepped, shape=[2]), shape=[2])
    loss = b.loss(y)
    with pytest.raises(ExportError, match="'unused' does not influence the loss"):
        differentiate(b.graph, loss, [x, unused])
    with pytest.raises(ExportError, match="'stepped' does not influence the loss"):
        differentiate(b.graph, loss, [x, stepped])


@pytest.mark.parametrize(("shape", "dtype"), [([2], FLOAT), ([], ir.DataType.INT64)])
def test_the_loss_must_be_a_scalar(shape: list[int], dtype: ir.DataType) -> None:
    b = Builder()
    x = b.input("x", shape, dtype)
    with pytest.raises(ExportError, match="must be a floating-point scalar"):
        differentiate(b.graph, b.op("Identity", x, shape=shape, dtype=dtype), [x])


def test_old_opsets_are_refused() -> None:
    b = Builder(opset=17)
    x = b.input("x", [])
    with pytest.raises(ExportError, match="opset 17; gradients need opset 18"):
        differentiate(b.graph, b.op("Neg", x, shape=[]), [x])


def test_an_unknown_rank_is_an_error_that_names_the_value() -> None:
    b = Builder()
    x, w = b.input("x", [2, 2]), b.input("w", [2, 2])
    y = b.op("Relu", x, shape=None)
    y.name = "hidden"
    z = b.op("MatMul", y, w, shape=[2, 2])
    with pytest.raises(ExportError, match=r"rank of value 'hidden' \(made by Relu node"):
        differentiate(b.graph, b.loss(z), [w])


def test_only_wanted_cotangents_are_emitted() -> None:
    b = Builder()
    x, w = b.input("x", [4, 3]), b.input("w", [3, 2])
    y = b.op("MatMul", x, w, shape=[4, 2])
    loss = b.loss(y)
    before = len(list(b.graph))
    differentiate(b.graph, loss, [w])
    assert operators(b.graph, before) == {"Expand": 1, "Gemm": 1}


def test_shared_work_is_emitted_once_and_reuses_the_forward_pass() -> None:
    """d(x·σ(x)) needs σ(x), which the forward pass has."""
    b = Builder()
    x = b.input("x", ["n"])
    gate = b.op("Sigmoid", x, shape=["n"])
    y = b.op("Mul", x, gate, shape=["n"])
    loss = b.loss(y)
    before = len(list(b.graph))
    gradient = differentiate(b.graph, loss, [x])[x]
    emitted = operators(b.graph, before)
    assert emitted["Sigmoid"] == 0
    assert emitted["Mul"] == 2
    values = np.linspace(-2, 2, 5).astype(np.float32)
    got = b.run(loss, [gradient], {"x": values})[1]
    s = 1 / (1 + np.exp(-values))
    np.testing.assert_allclose(got, s * (1 + values * (1 - s)), rtol=1e-5)


def test_many_cotangents_of_one_value_are_summed_in_one_node() -> None:
    b = Builder()
    x = b.input("x", [3])
    uses = [b.op(op, x, shape=[3]) for op in ("Exp", "Sin", "Tanh", "Neg")]
    loss = b.loss(b.op("Sum", *uses, shape=[3]))
    before = len(list(b.graph))
    differentiate(b.graph, loss, [x])
    emitted = operators(b.graph, before)
    assert (emitted["Sum"], emitted["Add"]) == (1, 0)


def test_a_scattered_cotangent_is_added_into_the_dense_one() -> None:
    """Cross-entropy: logsumexp(x) − x[label] makes no zeros of the size of x."""
    b = Builder()
    x, labels = b.input("x", ["n", 5]), b.input("labels", ["n", 1], ir.DataType.INT64)
    axis = b.constant("axis", np.array([-1]))
    lse = b.op("ReduceLogSumExp", x, axis, shape=["n", 1])
    picked = b.op("GatherElements", x, labels, shape=["n", 1], axis=-1)
    loss = b.loss(b.op("Sub", lse, picked, shape=["n", 1]))
    before = len(list(b.graph))
    gradient = differentiate(b.graph, loss, [x])[x]
    emitted = operators(b.graph, before)
    assert emitted["ScatterElements"] == 1
    assert emitted["Expand"] == 1, "only the scalar's cotangent is expanded"
    rng = np.random.default_rng(0)
    values, wanted = rng.standard_normal((3, 5)).astype(np.float32), np.array([[0], [4], [4]])
    got = b.run(loss, [gradient], {"x": values, "labels": wanted})[1]
    expected = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    expected[np.arange(3), wanted[:, 0]] -= 1
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_intermediate_values_have_cotangents_too() -> None:
    b = Builder()
    x = b.input("x", [3])
    hidden = b.op("Exp", x, shape=[3])
    loss = b.loss(b.op("Mul", hidden, hidden, shape=[3]))
    gradients = differentiate(b.graph, loss, [x, hidden])
    values = np.array([0.1, 0.2, 0.3], np.float32)
    _, dx, dhidden = b.run(loss, [gradients[x], gradients[hidden]], {"x": values})
    np.testing.assert_allclose(dhidden, 2 * np.exp(values), rtol=1e-5)
    np.testing.assert_allclose(dx, 2 * np.exp(2 * values), rtol=1e-5)


def test_the_loss_may_be_its_own_variable() -> None:
    b = Builder()
    x = b.input("x", [])
    loss = b.op("Exp", x, shape=[])
    assert differentiate(b.graph, loss, [loss])[loss].shape == ir.Shape([])


def test_dynamic_broadcasting_is_right_for_every_run_time_shape() -> None:
    """One graph, in which the same axis is broadcast or not depending on what is fed."""
    b = Builder()
    x, y = b.input("x", ["a", "b"]), b.input("y", ["c", "d"])
    loss = b.loss(b.op("Mul", x, y, shape=[None, None]))
    gradients = differentiate(b.graph, loss, [x, y])
    b.graph.outputs.extend([gradients[x], gradients[y]])
    call = evaluator(ir.to_proto(ir.Model(b.graph, ir_version=11)), np.float32)
    rng = np.random.default_rng(0)
    for first, second in (
        ((2, 3), (2, 3)),
        ((1, 3), (2, 3)),
        ((2, 1), (1, 3)),
        ((2, 3), (1, 1)),
        ((0, 3), (1, 3)),
    ):
        u, v = rng.random(first).astype(np.float32), rng.random(second).astype(np.float32)
        du, dv = call({"x": u, "y": v})
        ones = np.ones(np.broadcast_shapes(first, second), np.float32)
        for got, other, shape in ((du, v, first), (dv, u, second)):
            full = ones * other
            axes = tuple(i for i in range(2) if shape[i] == 1)
            np.testing.assert_allclose(got, full.sum(axes, keepdims=True), rtol=1e-5)


def test_known_equal_symbols_need_no_unbroadcast() -> None:
    b = Builder()
    x, y = b.input("x", ["batch", "seq", 4]), b.input("y", ["batch", "seq", 4])
    loss = b.loss(b.op("Mul", x, y, shape=["batch", "seq", 4]))
    before = len(list(b.graph))
    differentiate(b.graph, loss, [x, y])
    assert operators(b.graph, before) == {"Shape": 1, "Expand": 1, "Mul": 2}


def test_layer_normalization_reuses_the_statistics_of_the_forward_pass() -> None:
    b = Builder()
    x, w = b.input("x", ["n", 4]), b.input("w", [4])
    y = b.op("LayerNormalization", x, w, shape=["n", 4], axis=-1)
    loss = b.loss(y)
    before = len(list(b.graph))
    differentiate(b.graph, loss, [x, w])
    emitted = operators(b.graph, before)
    assert emitted["Sqrt"] == emitted["Reciprocal"] == 0
    node = y.producer()
    assert node is not None
    assert len(node.outputs) == 3


def test_backward_nodes_carry_the_scope_of_their_forward_node() -> None:
    b = Builder()
    x = b.input("x", [3])
    loss = b.loss(b.op("Exp", x, shape=[3], scope="model/layer.0"))
    before = len(list(b.graph))
    differentiate(b.graph, loss, [x])
    scopes = [
        node.metadata_props.get("namespace") for node in list(b.graph)[before:] if node.op_type == "Mul"
    ]
    assert scopes == ["model/layer.0"]


def test_values_captured_by_a_subgraph_are_refused_by_name() -> None:
    b = Builder()
    x, flag = b.input("x", [2]), b.input("flag", [], ir.DataType.BOOL)
    branches = []
    for op in ("Exp", "Neg"):
        value = ir.Value(name=f"{op}_out", shape=ir.Shape([2]), type=ir.TensorType(FLOAT))
        inner = ir.Graph([], [value], nodes=[ir.node(op, [x], outputs=[value])], name=op)
        branches.append(inner)
    y = b.op("If", flag, shape=[2], then_branch=branches[0], else_branch=branches[1])
    with pytest.raises(UnsupportedOperatorError, match=r"ai\.onnx::If"):
        differentiate(b.graph, b.loss(y), [x])
