"""onnxruntime's fused operators and what they are lowered to compute the same."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepeft.errors import ExportError
from edgepeft.exporters.graph import MICROSOFT, append, graph_input, initializer, new_model, tidy
from edgepeft.exporters.passes.attention.group_query import lower_group_query_attention
from edgepeft.exporters.passes.attention.multi_head import lower_multi_head_attention, lower_packed_attention
from edgepeft.exporters.passes.drop_cache import drop_cache
from edgepeft.exporters.passes.shapes.infer import infer_shapes
from edgepeft.exporters.passes.shapes.position_ids import derive_position_ids
from edgepeft.exporters.passes.weights.linears import find_marked_linears, mark_linear, unpack
from edgepeft.exporters.quantize.exact_products import use_exact_products
from edgepeft.exporters.techniques import insert_slots
from edgepeft.exporters.techniques.base import BaseGraph

BATCH, ROWS, HEADS, KV_HEADS, SIZE = 3, 7, 4, 2, 32
LENGTHS = np.array([7, 4, 5])
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64

Feeds = dict[str, np.ndarray]


def run(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    """All outputs."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
    return [np.asarray(output) for output in outputs]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grouped(
    *, packed: bool, tables: int = SIZE // 2, norms: bool = False, **attributes: Any
) -> tuple[ir.Model, Feeds]:
    """A graph of one `GroupQueryAttention` over a cache, and inputs for it."""
    graph = ir.Graph([], [], nodes=[], name="gqa")
    model = new_model(graph)
    widths = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    feeds: Feeds = {}
    inputs: list[ir.Value | None] = []
    for index, name in enumerate(("query", "key", "value")):
        if packed and index:
            inputs.append(None)
            continue
        width = sum(widths) if packed else widths[index]
        feeds[name] = random(BATCH, ROWS, width, seed=index)
        inputs.append(graph_input(graph, name, ["batch", "sequence", width]))
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        feeds[name] = np.zeros((BATCH, KV_HEADS, 0, SIZE), np.float32)
        inputs.append(graph_input(graph, name, ["batch", KV_HEADS, "past", SIZE]))
    feeds["seqlens"] = (LENGTHS - 1).astype(np.int32)
    inputs.append(graph_input(graph, "seqlens", ["batch"], INT32))
    inputs.append(initializer(graph, "total", np.array(ROWS, np.int32)))
    if attributes.get("do_rotary"):
        angles = random(32, tables, seed=9)
        inputs += [initializer(graph, "cos", np.cos(angles)), initializer(graph, "sin", np.sin(angles))]
    else:
        inputs += [None, None]
    if norms:
        inputs += [None] * 5
        inputs += [initializer(graph, name, 1 + random(SIZE, seed=i)) for i, name in enumerate(("qn", "kn"))]
    node = ir.node(
        "GroupQueryAttention",
        inputs,
        {"num_heads": HEADS, "kv_num_heads": KV_HEADS, **attributes},
        domain=MICROSOFT,
        num_outputs=3,
    )
    graph.append(node)
    shapes = [["batch", "sequence", HEADS * SIZE], *[["batch", KV_HEADS, "total", SIZE]] * 2]
    for output, name, shape in zip(
        node.outputs, ("y", "present.0.key", "present.0.value"), shapes, strict=True
    ):
        output.name, output.shape, output.dtype = name, ir.Shape(shape), ir.DataType.FLOAT
        graph.outputs.append(output)
    return model, feeds


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"local_window_size": 3},
        {"local_window_size": 1},
        {"do_rotary": 1},
        {"do_rotary": 1, "rotary_interleaved": 1},
        {"do_rotary": 1, "tables": SIZE // 4},
    ],
    ids=str,
)
def test_group_query_attention(packed: bool, attributes: dict[str, Any]) -> None:
    model, feeds = grouped(packed=packed, **attributes)
    expected = run(model, feeds)[0]
    lowered = model.clone()
    drop_cache(lowered.graph)
    assert lower_group_query_attention(lowered.graph) == 1
    tidy(lowered)
    assert "GroupQueryAttention" not in {node.op_type for node in lowered.graph}
    assert [value.name for value in lowered.graph.outputs] == ["y"]
    assert not any("past" in (value.name or "") for value in lowered.graph.inputs)
    (got,) = run(lowered, feeds)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :length], expected[row, :length], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"smooth_softmax": 1}, "its attribute smooth_softmax is 1"),
        ({"norms": True}, "its input q_norm_weight has no counterpart"),
        ({"causal": 0}, "its attribute causal is 0"),
        ({"k_quant_type": "PER_TENSOR"}, "its attribute k_quant_type is PER_TENSOR"),
    ],
)
def test_what_group_query_attention_cannot_be_lowered(attributes: dict[str, Any], match: str) -> None:
    model, _ = grouped(packed=True, **attributes)
    drop_cache(model.graph)
    with pytest.raises(ExportError, match=match):
        lower_group_query_attention(model.graph)


def multi_head(*given: str, **attributes: Any) -> tuple[ir.Model, Feeds]:
    """A graph of one `MultiHeadAttention` with these optional inputs."""
    graph = ir.Graph([], [], nodes=[], name="mha")
    model = new_model(graph)
    width = HEADS * SIZE
    mask = (np.arange(ROWS)[None, :] < LENGTHS[:, None]).astype(np.int32)
    arrays = {
        **{name: random(BATCH, ROWS, width, seed=i) for i, name in enumerate(("query", "key", "value"))},
        "bias": random(3 * width, seed=3),
        "mask": mask,
        "addend": random(BATCH, HEADS, ROWS, ROWS, seed=4),
    }
    shapes: dict[str, list[Any]] = {
        **{name: ["batch", "sequence", width] for name in ("query", "key", "value")},
        "bias": [3 * width],
        "mask": ["batch", "sequence"],
        "addend": ["batch", HEADS, "sequence", "sequence"],
    }
    names = ["query", "key", "value", "bias", "mask", "addend"]
    inputs = [
        graph_input(graph, name, shapes[name], INT32 if name == "mask" else ir.DataType.FLOAT)
        if name in ("query", "key", "value", *given)
        else None
        for name in names
    ]
    y = append(
        graph,
        "MultiHeadAttention",
        inputs,
        {"num_heads": HEADS, **attributes},
        shape=["batch", "sequence", width],
        domain=MICROSOFT,
        name="y",
    )
    graph.outputs.append(y)
    return model, arrays


@pytest.mark.parametrize(
    ("given", "attributes"),
    [
        ((), {}),
        (("bias",), {"scale": 0.2}),
        (("mask",), {}),
        (("bias", "mask"), {"unidirectional": 1}),
        (("addend",), {}),
        (("bias", "mask", "addend"), {}),
        ((), {"unidirectional": 1}),
    ],
)
def test_multi_head_attention(given: tuple[str, ...], attributes: dict[str, Any]) -> None:
    model, feeds = multi_head(*given, **attributes)
    expected = run(model, feeds)[0]
    lowered = model.clone()
    assert lower_multi_head_attention(lowered.graph) == 1
    tidy(lowered)
    assert "Attention" in {node.op_type for node in lowered.graph if not node.domain}
    np.testing.assert_allclose(run(lowered, feeds)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.1}])
def test_packed_attention(attributes: dict[str, Any]) -> None:
    graph = ir.Graph([], [], nodes=[], name="attention")
    model = new_model(graph)
    width = HEADS * SIZE
    x = graph_input(graph, "x", ["batch", "sequence", width])
    mask = graph_input(graph, "mask", ["batch", "sequence"], INT32)
    weights = initializer(graph, "weights", random(width, 3 * width, seed=1) / 11)
    bias = initializer(graph, "bias", random(3 * width, seed=2))
    y = append(
        graph,
        "Attention",
        [x, weights, bias, mask],
        {"num_heads": HEADS, **attributes},
        shape=["batch", "sequence", width],
        domain=MICROSOFT,
        name="y",
    )
    graph.outputs.append(y)
    feeds = {
        "x": random(BATCH, ROWS, width),
        "mask": (np.arange(ROWS)[None, :] < LENGTHS[:, None]).astype(np.int32),
    }
    expected = run(model, feeds)[0]
    assert lower_packed_attention(graph) == 1
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=0, atol=2e-5)
    assert lower_multi_head_attention(graph) == 1
    tidy(model)
    assert MICROSOFT not in {node.domain for node in graph}
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=0, atol=2e-5)


def test_a_past_that_is_joined_is_taken_away_and_any_other_is_empty() -> None:
    graph = ir.Graph([], [], nodes=[], name="cache")
    model = new_model(graph)
    new = graph_input(graph, "new", ["batch", 2, "sequence", 4])
    past = graph_input(graph, "past_key_values.0.key", ["batch", 2, "past", 4])
    other = graph_input(graph, "past_key_values.0.value", ["batch", 2, "past", 4])
    joined = append(graph, "Concat", [past, new], {"axis": 2}, shape=["batch", 2, "total", 4])
    joined.name = "present.0.key"
    length = append(graph, "Shape", [other], shape=[4], dtype=INT64)
    length.name = "length"
    y = append(graph, "Identity", [joined], shape=joined.shape, name="y")
    graph.outputs.extend([y, joined, length])
    drop_cache(graph)
    tidy(model)
    x = random(3, 2, 5, 4)
    assert [value.name for value in graph.inputs] == ["new"]
    got = run(model, {"new": x})
    np.testing.assert_array_equal(got[0], x)
    np.testing.assert_array_equal(got[1], [3, 2, 0, 4])


def test_axes_lose_the_length_of_the_past_that_is_taken_away() -> None:
    """And keep what is no plain sum, or has no past in it."""
    graph = ir.Graph([], [], nodes=[], name="axes")
    ids = graph_input(graph, "input_ids", ["batch", "sequence"], INT64)
    mask = graph_input(graph, "attention_mask", ["batch", "total"], INT64)
    graph_input(graph, "past_key_values.0.key", ["batch", 2, "past", 4])
    shapes = (["batch", "sequence + past"], ["past + sequence", 3], ["batch*past", None], ["batch", "total"])
    for shape in shapes:
        graph.outputs.append(append(graph, "Identity", [ids], shape=shape, dtype=INT64))
    drop_cache(graph)
    assert mask.shape == ["batch", "sequence"]
    assert [list(value.shape or ()) for value in graph.outputs] == [
        ["batch", "sequence"],
        ["sequence", 3],
        ["batch*past", None],
        ["batch", "sequence"],
    ]


@pytest.mark.parametrize("with_mask", [True, False])
def test_positions_are_counted_from_the_mask(with_mask: bool) -> None:
    graph = ir.Graph([], [], nodes=[], name="positions")
    model = new_model(graph)
    graph_input(graph, "input_ids", ["batch", "sequence"], INT64)
    if with_mask:
        graph_input(graph, "attention_mask", ["batch", "total"], INT64)
    given = graph_input(graph, "position_ids", ["batch", "sequence"], INT64)
    graph.outputs.append(append(graph, "Identity", [given], shape=given.shape, dtype=INT64, name="y"))
    assert derive_position_ids(graph)
    assert not derive_position_ids(graph)
    tidy(model)
    feeds = {
        "input_ids": np.zeros((2, 3), np.int64),
        "attention_mask": np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    }
    expected = [[2, 3, 3], [1, 2, 3]] if with_mask else [[0, 1, 2], [0, 1, 2]]
    np.testing.assert_array_equal(run(model, feeds)[0], expected)


def test_rounded_activations_are_not() -> None:
    """What was a staircase is the product with the dequantized weight."""
    graph = ir.Graph([], [], nodes=[], name="product")
    model = new_model(graph)
    rng = np.random.default_rng(0)
    x = graph_input(graph, "x", ["n", 64])
    codes = rng.integers(0, 256, (16, 2, 16)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.5, (16, 2)).astype(np.float32)
    y = append(
        graph,
        "MatMulNBits",
        [x, initializer(graph, "codes", codes), initializer(graph, "scales", scales)],
        {"K": 64, "N": 16, "bits": 4, "block_size": 32, "accuracy_level": 4},
        shape=["n", 16],
        domain=MICROSOFT,
        name="y",
    )
    graph.outputs.append(y)
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(16, 2, 32).astype(np.float32)
    weight = ((halves - 8) * scales[..., None]).reshape(16, 64)
    feeds = {"x": random(5, 64)}
    assert use_exact_products(graph) == 1
    assert use_exact_products(graph) == 0
    np.testing.assert_allclose(run(model, feeds)[0], feeds["x"] @ weight.T, rtol=0, atol=2e-4)


def test_layers_packed_in_one_product_have_slots_of_their_own() -> None:
    """Columns of one product are three layers; the middle one gets no slot."""
    graph = ir.Graph([], [], nodes=[], name="packed")
    model = new_model(graph)
    x = graph_input(graph, "x", ["n", 16])
    weight = random(16, 8, seed=1)
    y = append(graph, "MatMul", [x, initializer(graph, "w", weight)], shape=["n", 8])
    graph.outputs.append(append(graph, "Identity", [y], shape=["n", 8], name="y"))
    product = y.producer()
    assert product is not None
    mark_linear(product, "attn.qkv_proj")
    x.shape = ir.Shape(["n", 16])
    parts = unpack(find_marked_linears(graph), {"attn.qkv_proj": {"attn.q": 4, "attn.k": 2, "attn.v": 2}})
    assert {name: (part.first, part.out_features) for name, part in parts.items()} == {
        "attn.q": (0, 4),
        "attn.k": (4, 2),
        "attn.v": (6, 2),
    }
    slots = insert_slots(BaseGraph(graph, {}, {}), {"lora": [parts["attn.q"], parts["attn.v"]]})
    tidy(model)
    feeds: Feeds = {"x": random(5, 16)}
    expected = feeds["x"] @ weight
    for seed, slot in enumerate(slots):
        a, b = random(16, 3, seed=10 + seed), random(3, parts[slot.module].out_features, seed=20 + seed)
        feeds |= dict(zip(slot.inputs, (a, b, np.full(3, 0.5, np.float32)), strict=True))
        part = parts[slot.module]
        expected[:, part.first : part.first + part.out_features] += 0.5 * feeds["x"] @ a @ b
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=0, atol=1e-4)


def test_shapes_go_through_quantized_lookups_and_products() -> None:
    graph = ir.Graph([], [], nodes=[], name="shapes")
    model = new_model(graph)
    ids = graph_input(graph, "ids", ["batch", "sequence"], INT64)
    table = initializer(graph, "table", np.zeros((320, 32), np.uint8))
    scales = initializer(graph, "scales", np.ones((320, 2), np.float32))
    attributes = {"bits": 4, "block_size": 32}
    lookup = ir.node(
        "GatherBlockQuantized",
        [table, ids, scales],
        {"gather_axis": 0, "quantize_axis": 1, **attributes},
        domain=MICROSOFT,
    )
    codes = initializer(graph, "codes", np.zeros((16, 2, 16), np.uint8))
    more = initializer(graph, "more", np.ones((16, 2), np.float32))
    product = ir.node(
        "MatMulNBits", [lookup.outputs[0], codes, more], {"K": 64, "N": 16, **attributes}, domain=MICROSOFT
    )
    graph.extend([lookup, product])
    y = append(graph, "Relu", [product.outputs[0]], shape=None, dtype=None, name="y")
    graph.outputs.append(y)
    infer_shapes(model)
    assert str(lookup.outputs[0].shape) == "[batch,sequence,64]"
    assert str(product.outputs[0].shape) == "[batch,sequence,16]"
    assert str(y.shape) == "[batch,sequence,16]"
    assert y.dtype == ir.DataType.FLOAT
    assert lookup in list(graph), "the graph itself is left as it was"


def test_a_tool_that_gives_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's tool saves what it has of a graph with an unknown operator; onnx's takes over."""
    graph = ir.Graph([], [], nodes=[], name="g")
    model = new_model(graph)
    x = graph_input(graph, "x", ["batch", 4])
    unknown = append(graph, "Unknown", [x], shape=None, dtype=None, domain="elsewhere")
    graph.opset_imports["elsewhere"] = 1
    graph.outputs.append(append(graph, "Relu", [unknown], shape=None, dtype=None))
    graph.outputs.append(append(graph, "Relu", [x], shape=None, dtype=None))
    monkeypatch.chdir(tmp_path)
    infer_shapes(model)
    assert str(graph.outputs[1].shape) == "[batch,4]"
    assert not list(tmp_path.iterdir())
