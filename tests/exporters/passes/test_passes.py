"""Each pass alone: the graph before and after it computes the same, or what numpy says it should."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgepeft.exporters.graph import append, graph_input, initializer, new_model, tidy
from edgepeft.exporters.passes.attention.rotary import expand_rotary_caches
from edgepeft.exporters.passes.attention.standard import simplify_attention
from edgepeft.exporters.passes.weights.linears import find_embeddings, find_linears, select
from edgepeft.exporters.quantize.blockwise import quantize
from edgepeft.exporters.quantize.freeze import Freezer
from edgepeft.exporters.techniques import graph_technique, insert_slots
from edgepeft.exporters.techniques.base import BaseGraph

VOCABULARY, WIDTH, HIDDEN = 48, 64, 32


class Toy:
    """An embedding, a linear without and one with a bias, and an output head tied to the embedding."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "embed.weight": (VOCABULARY, WIDTH),
            "up.weight": (HIDDEN, WIDTH),
            "down.weight": (WIDTH, HIDDEN),
            "down.bias": (WIDTH,),
            "norm": (WIDTH,),
        }
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        graph = ir.Graph([], [], nodes=[], name="toy")
        self.model = new_model(graph)
        ids = graph_input(graph, "ids", ["n"], ir.DataType.INT64)
        self.inputs = {
            name: graph_input(graph, name, list(value.shape)) for name, value in self.weights.items()
        }

        def linear(x: ir.Value, weight: str, width: int) -> ir.Value:
            turned = append(graph, "Transpose", [self.inputs[weight]], {"perm": [1, 0]}, shape=[None, width])
            return append(graph, "MatMul", [x, turned], shape=["n", width])

        rows = append(graph, "Gather", [self.inputs["embed.weight"], ids], {"axis": 0}, shape=["n", WIDTH])
        rows = append(graph, "Mul", [rows, self.inputs["norm"]], shape=["n", WIDTH])
        up = append(graph, "Tanh", [linear(rows, "up.weight", HIDDEN)], shape=["n", HIDDEN])
        down = append(
            graph,
            "Gemm",
            [up, self.inputs["down.weight"], self.inputs["down.bias"]],
            {"transB": 1},
            shape=["n", WIDTH],
        )
        logits = linear(down, "embed.weight", VOCABULARY)
        logits.name = "logits"
        graph.outputs.append(logits)

    def linears(self) -> dict[str, Any]:
        return find_linears(self.inputs.values())

    def freeze(self, bits: int) -> Freezer:
        freezer = Freezer(bits, 32)
        freezer.freeze(
            self.model.graph, {name: (value, self.weights[name]) for name, value in self.inputs.items()}
        )
        tidy(self.model)
        return freezer

    def run(self, **feeds: np.ndarray) -> np.ndarray:
        data = ir.to_proto(self.model).SerializeToString()
        session = ort.InferenceSession(data, disabled_optimizers=["ConstantFolding"])
        feeds = {"ids": np.arange(7), **feeds}
        (result,) = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
        return np.asarray(result)

    def expected(self, weights: dict[str, torch.Tensor], **deltas: torch.Tensor) -> np.ndarray:
        """The same by hand; `deltas` are added to weights."""
        w = {name: value + deltas.get(name.replace(".weight", ""), 0) for name, value in weights.items()}
        x = w["embed.weight"][:7] * w["norm"]
        hidden = torch.tanh(x @ w["up.weight"].T) @ w["down.weight"].T + w["down.bias"]
        return (hidden @ weights["embed.weight"].T).numpy()


def test_linears_and_embeddings_are_found_by_their_weights() -> None:
    toy = Toy()
    found = toy.linears()
    assert {name: (item.in_features, item.out_features) for name, item in found.items()} == {
        "embed": (WIDTH, VOCABULARY),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    assert [item.module for item in find_embeddings(toy.inputs.values())] == ["embed"]
    assert list(select(found, ["down", "up"])) == ["up", "down"]


def test_a_transposed_or_scaled_gemm_is_no_linear() -> None:
    graph = ir.Graph([], [], nodes=[], name="g")
    x, weight = graph_input(graph, "x", [4, 8]), graph_input(graph, "m.weight", [4, 8])
    append(graph, "Gemm", [x, weight], {"transA": 1, "transB": 1}, shape=[8, 4])
    append(graph, "Gemm", [x, weight], {"transB": 1, "alpha": 0.5}, shape=[4, 4])
    append(graph, "MatMul", [x, weight], shape=[4, 8])
    assert find_linears([weight]) == {}


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_frozen_weights_are_the_reference_that_is_reported(bits: int) -> None:
    toy = Toy()
    freezer = toy.freeze(bits)
    assert freezer.reference.keys() == toy.weights.keys()
    assert not freezer.exceptions
    np.testing.assert_allclose(toy.run(), toy.expected(freezer.reference), rtol=1e-4, atol=1e-3)
    steps = {4: 0.12, 8: 0.008, 16: 1e-3, 32: 0.0}
    for name, value in freezer.reference.items():
        assert float((value - toy.weights[name]).abs().max()) <= steps[bits] * float(
            toy.weights[name].abs().max()
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_embedding_is_quantized_once(bits: int) -> None:
    toy = Toy()
    toy.freeze(bits)
    graph = toy.model.graph
    operators = [node.op_type for node in graph]
    assert operators.count("MatMulNBits") == 3
    assert operators.count("GatherBlockQuantized") == 1
    tensors = [graph.initializers[f"embed.weight.q{bits}{suffix}"].const_value for suffix in ("", ".rows")]
    assert tensors[0] is not None
    assert tensors[1] is not None
    assert tensors[0].tobytes() == tensors[1].tobytes()


def test_a_row_that_no_block_divides_is_kept_in_half_precision() -> None:
    toy = Toy()
    freezer = Freezer(4, 64)
    freezer.freeze(toy.model.graph, {name: (value, toy.weights[name]) for name, value in toy.inputs.items()})
    tidy(toy.model)
    assert freezer.exceptions == {"down.weight": 16}
    np.testing.assert_allclose(toy.run(), toy.expected(freezer.reference), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_slot_adds_the_low_rank_product(bits: int, rank: int) -> None:
    toy = Toy()
    base = BaseGraph(toy.model.graph, {}, {}, toy.linears())
    technique = graph_technique("lora")
    slots = insert_slots(base, {"lora": technique.sites(base, {"up": {}, "down": {}})})
    freezer = toy.freeze(bits)
    rng = np.random.default_rng(rank)
    feeds: dict[str, np.ndarray] = {}
    deltas = {}
    for slot in slots:
        a, b = (rng.standard_normal(tensor.sized(rank)).astype(np.float32) for tensor in slot.tensors[:2])
        scaling = rng.standard_normal(rank).astype(np.float32)
        feeds |= dict(zip(slot.inputs, (a, b, scaling), strict=True))
        deltas[slot.module] = torch.from_numpy(((a * scaling) @ b).T.copy())
    np.testing.assert_allclose(
        toy.run(**feeds), toy.expected(freezer.reference, **deltas), rtol=1e-3, atol=5e-3
    )


def test_a_saved_module_stays_an_input_under_pefts_key() -> None:
    toy = Toy()
    weights = dict(toy.inputs)
    base = BaseGraph(toy.model.graph, weights, {})
    saved = insert_slots(base, {"whole": graph_technique("whole").sites(base, {"down": {}})})
    assert [(slot.tensors[0].input, slot.tensors[0].shape) for slot in saved] == [
        ("base_model.model.down.weight", (WIDTH, HIDDEN)),
        ("base_model.model.down.bias", (WIDTH,)),
    ]
    assert weights.keys() == {"embed.weight", "up.weight", "norm"}
    freezer = Freezer(32, 32)
    freezer.freeze(toy.model.graph, {name: (value, toy.weights[name]) for name, value in weights.items()})
    tidy(toy.model)
    replaced = {**toy.weights, "down.weight": torch.ones(WIDTH, HIDDEN), "down.bias": torch.zeros(WIDTH)}
    feeds = {slot.inputs[0]: replaced[slot.tensors[0].neutral].numpy() for slot in saved}
    np.testing.assert_allclose(toy.run(**feeds), toy.expected(replaced), rtol=1e-4, atol=1e-3)


def test_rotary_caches_serve_any_batch() -> None:
    """onnxruntime refuses caches of batch 1 at batch 3; after the pass it computes the rotation."""
    graph = ir.Graph([], [], nodes=[], name="rotary")
    model = new_model(graph)
    x = graph_input(graph, "x", ["batch", 2, "sequence", 8])
    angles = initializer(graph, "angles", np.linspace(0, 3, 5 * 4, dtype=np.float32).reshape(1, 5, 4))
    cos, sin = (append(graph, op, [angles], shape=None, dtype=None) for op in ("Cos", "Sin"))
    y = append(graph, "RotaryEmbedding", [x, cos, sin], shape=x.shape)
    graph.outputs.append(y)
    values = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).astype(np.float32)

    def run() -> np.ndarray:
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
        return np.asarray(session.run(None, {"x": values})[0])

    with pytest.raises(Exception, match="cos_cache"):
        run()
    expand_rotary_caches(graph)
    tidy(model)
    assert sum(node.op_type == "Expand" for node in graph) == 2
    table = np.linspace(0, 3, 20).reshape(5, 4)
    first, second = values[..., :4], values[..., 4:]
    expected = np.concatenate(
        [first * np.cos(table) - second * np.sin(table), first * np.sin(table) + second * np.cos(table)],
        axis=-1,
    )
    np.testing.assert_allclose(run(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_extremes_survive_quantization(bits: int) -> None:
    weight = torch.zeros(3, 64)
    weight[1, :32] = 5.0
    weight[2, 40] = -3.0
    decoded = quantize(weight, bits, 32).dequantize()
    np.testing.assert_allclose(decoded, weight.numpy(), rtol=0.01)


def test_four_bits_are_no_worse_than_plain_rounding() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    blocks = weight.reshape(64, 8, 32)
    scale = blocks.abs().amax(dim=2, keepdim=True) / 7
    plain = ((blocks / scale).round().clamp(-8, 7) * scale - blocks).square().mean()
    ours = (quantize(weight, 4, 32).dequantize() - weight).square().mean()
    assert float(ours) < 0.9 * float(plain)


def grouped_attention(guard: bool) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Two key/value heads repeated for six query heads, an additive mask, and a guard for masked rows."""
    graph = ir.Graph([], [], nodes=[], name="attention")
    model = new_model(graph)
    query = graph_input(graph, "q", [2, 6, 5, 8])
    key, value = (graph_input(graph, name, [2, 2, 5, 8]) for name in ("k", "v"))
    mask = graph_input(graph, "mask", [2, 1, 5, 5])

    def integers(name: str, *values: int) -> ir.Value:
        return initializer(graph, name, np.array(values, np.int64))

    def repeat(source: ir.Value) -> ir.Value:
        apart = append(graph, "Unsqueeze", [source, integers("two", 2)], shape=[2, 2, 1, 5, 8])
        wide = append(graph, "Expand", [apart, integers("wide", 2, 2, 3, 5, 8)], shape=[2, 2, 3, 5, 8])
        return append(graph, "Reshape", [wide, integers("flat", 2, 6, 5, 8)], shape=[2, 6, 5, 8])

    output = append(graph, "Attention", [query, repeat(key), repeat(value), mask], shape=query.shape)
    if guard:
        half = initializer(graph, "half", np.array(-1e30, np.float32))
        highest = append(
            graph, "ReduceMax", [mask, integers("last", -1)], {"keepdims": 1}, shape=[2, 1, 5, 1]
        )
        nothing = append(graph, "Less", [highest, half], shape=[2, 1, 5, 1], dtype=ir.DataType.BOOL)
        zero = initializer(graph, "zero", np.array(0, np.float32))
        output = append(graph, "Where", [nothing, zero, output], shape=query.shape)
    graph.outputs.append(output)
    rng = np.random.default_rng(0)
    feeds = {
        item.name: rng.standard_normal(item.shape.numpy()).astype(np.float32)
        for item in graph.inputs
        if item.name and item.shape
    }
    feeds["mask"] = np.where(np.tri(5) > 0, 0, np.finfo(np.float32).min).astype(np.float32) * np.ones(
        (2, 1, 1, 1)
    )
    feeds["mask"] = feeds["mask"].astype(np.float32)
    feeds["mask"][1, 0, :2] = np.finfo(
        np.float32
    ).min  # rows that may attend to nothing, as left padding makes
    return model, feeds


@pytest.mark.parametrize("guard", [False, True])
def test_attention_takes_grouped_heads_and_needs_no_guard(guard: bool) -> None:
    model, feeds = grouped_attention(guard)

    def run() -> np.ndarray:
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
        return np.asarray(session.run(None, feeds)[0])

    before = run()
    assert simplify_attention(model.graph) == 2 + guard
    tidy(model)
    assert [node.op_type for node in model.graph] == ["Attention"]
    assert not before[1, :, :2].any()
    np.testing.assert_allclose(run(), before, rtol=1e-5, atol=1e-6)


def test_heads_that_are_not_repeated_in_groups_stay() -> None:
    """`Expand` along another axis is no repetition of heads."""
    model, _ = grouped_attention(guard=False)
    for node in model.graph:
        if node.op_type == "Unsqueeze":
            node.replace_input_with(1, initializer(model.graph, "one", np.array([1], np.int64)))
    assert simplify_attention(model.graph) == 0
