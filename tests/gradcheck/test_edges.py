"""Gradients where an operator has its edge: no axes, a norm of 0, a type that a kernel does not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgepeft.exporters.autodiff import differentiate
from edgepeft.exporters.graph import detach
from edgepeft.exporters.passes.shapes.infer import infer_shapes


def gradient(
    text: str, feeds: dict[str, np.ndarray[Any, Any]], detached: str | None = None
) -> np.ndarray[Any, Any]:
    """The gradient of the output `loss` with respect to `x`, in onnxruntime; none through `detached`."""
    model = ir.from_onnx_text(text)
    graph = model.graph
    infer_shapes(model)
    for value in [value for node in graph for value in node.outputs if value.name == detached]:
        detach(value)
    x = next(value for value in graph.inputs if value.name == "x")
    cotangent = differentiate(graph, graph.outputs[0], [x])[x]
    node = ir.node("Identity", [cotangent])
    node.outputs[0].name, node.outputs[0].type = "gradient", x.type
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(["gradient"], feeds)
    return np.asarray(found)


@pytest.mark.parametrize(("axes", "count"), [([], 6), ([1], 3), ([0, 1], 6)])
def test_a_mean_over_axes_of_the_run_is_divided_by_what_it_is_over(axes: list[int], count: int) -> None:
    text = """
        <ir_version: 10, opset_import: ["": 21]>
        mean (float[2,3] x, int64[n] axes) => (float loss) {
            y = ReduceMean(x, axes)
            loss = ReduceSum <keepdims = 0> (y)
        }
    """
    found = gradient(text, {"x": np.ones((2, 3), np.float32), "axes": np.array(axes, np.int64)})
    np.testing.assert_allclose(found, np.full((2, 3), 1 / count), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_a_row_of_norm_0_has_no_gradient(p: int) -> None:
    """The others have what numpy says."""
    text = f"""
        <ir_version: 10, opset_import: ["": 22]>
        norm (float[2,3] x, float[2,3] w) => (float loss) {{
            y = LpNormalization <axis = 1, p = {p}> (x)
            z = Mul(y, w)
            loss = ReduceSum <keepdims = 0> (z)
        }}
    """
    x, w = np.array([[0, 0, 0], [3, -4, 1]], np.float32), np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    row, weights = x[1].astype(np.float64), w[1].astype(np.float64)
    norm = np.abs(row).sum() if p == 1 else np.sqrt((row**2).sum())
    slope = np.sign(row) if p == 1 else row / norm
    expected = (weights - slope * (weights * row / norm).sum()) / norm
    found = gradient(text, {"x": x, "w": w})
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "gathered",
    [
        "Gather(x, ids)",
        "GatherND(x, rows)",
        'Pad <mode = "edge"> (x, pads)',
    ],
)
def test_halves_are_added_up_where_they_came_from(gathered: str) -> None:
    """onnxruntime has no float16 kernel that adds up on a CPU."""
    text = f"""
        <ir_version: 10, opset_import: ["": 21]>
        halves (float16[3,2] x) => (float16 loss)
        <int64[3] ids = {{0, 0, 2}}, int64[3,1] rows = {{0, 0, 2}}, int64[4] pads = {{1, 0, 0, 0}}> {{
            y = {gathered}
            loss = ReduceSum <keepdims = 0> (y)
        }}
    """
    found = gradient(text, {"x": np.ones((3, 2), np.float16)})
    counts = [2, 1, 1] if gathered.startswith("Pad") else [2, 0, 1]
    np.testing.assert_array_equal(found, np.repeat(np.array(counts, np.float16)[:, None], 2, axis=1))


@pytest.mark.parametrize("guard", ["IsNaN(p)", "Equal(lowest, none)"])
def test_a_row_that_is_masked_throughout_has_no_gradient(guard: str) -> None:
    """As torch's exporter and the standard's Attention write it: a softmax of no numbers, replaced by 0."""
    text = f"""
        <ir_version: 10, opset_import: ["": 21]>
        masked (float[2,3] x, float[2,3] mask, float[2,3] v) => (float loss)
        <int64[1] last = {{-1}}, float zero = {{0}}, float[1] one = {{1}}, float[1] nought = {{0}}> {{
            infinity = Div(one, nought)
            none = Neg(infinity)
            lowest = ReduceMax(mask, last)
            s = Add(x, mask)
            p = Softmax <axis = -1> (s)
            gone = {guard}
            safe = Where(gone, zero, p)
            y = Mul(safe, v)
            loss = ReduceSum <keepdims = 0> (y)
        }}
    """
    mask = np.array([[-np.inf] * 3, [0, 0, -np.inf]], np.float32)
    v = np.array([[1, 2, 3], [4, 6, 8]], np.float32)
    found = gradient(text, {"x": np.zeros((2, 3), np.float32), "mask": mask, "v": v})
    np.testing.assert_allclose(found, [[0, 0, 0], [-0.5, 0.5, 0]], rtol=1e-6)


def test_no_gradient_flows_through_what_is_detached() -> None:
    """Of x * exp(x), with the exponential detached, that is exp(x): not exp(x) + x exp(x)."""
    text = """
        <ir_version: 10, opset_import: ["": 21]>
        scaled (float[2,3] x) => (float loss) {
            e = Exp(x)
            y = Mul(x, e)
            loss = ReduceSum <keepdims = 0> (y)
        }
    """
    x = np.arange(6, dtype=np.float32).reshape(2, 3) / 4
    np.testing.assert_allclose(gradient(text, {"x": x}, detached="e"), np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(gradient(text, {"x": x}), np.exp(x) * (1 + x), rtol=1e-6)
