"""Products by 8-bit codes as products by their halves: against numpy, and where an export puts them."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import edgepeft
from edgepeft.exporters.decoder.half_bytes import multiply_by_half_bytes
from edgepeft.exporters.graph import graph_input, new_model, tidy
from edgepeft.exporters.quantize.layouts import BlockValues, QuantizedWeight
from edgepeft.exporters.quantize.lower_minimums import lower_minimums
from edgepeft.exporters.quantize.products import QuantizedConstant

from .. import models


@pytest.mark.parametrize("with_minimums", [False, True])
@pytest.mark.parametrize("block_size", [16, 32])
def test_halves_multiply_as_the_bytes_do(block_size: int, with_minimums: bool) -> None:
    """Every byte is there, and an odd number of blocks."""
    rng = np.random.default_rng(0)
    rows, columns = 40, 7 * block_size
    codes = np.resize(np.arange(256, dtype=np.uint8), (rows, columns))
    shape = (rows, columns // block_size)
    minimums = BlockValues(rng.normal(size=shape).astype(np.float32)) if with_minimums else None
    weight = QuantizedWeight.of_codes(
        codes,
        BlockValues(rng.uniform(0.01, 0.02, shape).astype(np.float16)),
        8,
        block_size,
        zero_points=np.zeros(shape, np.uint8) if with_minimums else None,
        minimums=minimums,
    )
    graph = ir.Graph([], [], nodes=[], name="product")
    model = new_model(graph)
    x = graph_input(graph, "x", ["tokens", columns])
    y = QuantizedConstant(graph, "layer.weight", weight).multiply(x, ir.Shape(["tokens", rows]))
    y.name = "y"
    graph.outputs.append(y)
    tidy(model)
    assert multiply_by_half_bytes(graph) == 1
    assert lower_minimums(graph) == with_minimums
    tidy(model)
    assert {node.attributes["bits"].as_int() for node in graph if node.op_type == "MatMulNBits"} == {4}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for tokens in (1, 5):
        given = rng.standard_normal((tokens, columns), np.float32)
        expected = given @ weight.dequantize().numpy().T
        (got,) = session.run(None, {"x": given})
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_graphs_that_round_activations_keep_the_bytes(tmp_path: Path) -> None:
    manifest = edgepeft.export(models.llama(tied=True), tmp_path, bits=8, rank=2, train=False, verify=False)
    found = {}
    for role, graph in manifest.graphs.items():
        nodes = onnx.load(tmp_path / graph.file, load_external_data=False).graph.node
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        found[role] = {attr.i for node in products for attr in node.attribute if attr.name == "bits"}
    exact = {"decoder", "decoder.plain"}
    assert all(bits == {4} for role, bits in found.items() if role in exact)
    assert found["decoder.int8"] == found["decoder.int8.plain"] == found["inference"] == {8}
