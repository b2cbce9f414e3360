"""Weights of a table's values: against the formula, and onnxruntime's own operator on the same bytes."""

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.table_weight import FP4, NF4, TABLES, TableWeight


def drawn(rows: int, columns: int, block_size: int, quant_type: int) -> TableWeight:
    rng = np.random.default_rng(0)
    count = rows * columns
    packed = rng.integers(0, 256, count // 2, np.uint8)
    absmax = rng.uniform(0.5, 2, count // block_size).astype(np.float32)
    return TableWeight(packed, absmax, (rows, columns), block_size, quant_type)


@pytest.mark.parametrize("quant_type", [FP4, NF4])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (96, 64), (64, 128)])
def test_dequantize(columns: int, block_size: int, quant_type: int) -> None:
    """Blocks may go on in the next row."""
    weight = drawn(8, columns, block_size, quant_type)
    table = TABLES[quant_type]
    flat = [
        table[byte // 16 if place == 0 else byte % 16] * weight.absmax[(2 * index + place) // block_size]
        for index, byte in enumerate(weight.packed.tolist())
        for place in range(2)
    ]
    assert np.array_equal(weight.dequantize().numpy(), np.array(flat, np.float32).reshape(8, columns))


def test_rows_are_picked_where_blocks_end_with_them() -> None:
    weight, rows = drawn(8, 128, 64, NF4), np.array([5, 0, 5])
    assert np.array_equal(weight.with_rows(rows).dequantize().numpy(), weight.dequantize().numpy()[rows])
    with pytest.raises(ExportError, match=r"96 weights share scales in blocks of 64.*--keep-vocabulary"):
        drawn(8, 96, 64, NF4).with_rows(rows)


def test_a_weight_in_a_scratch_file() -> None:
    weight = drawn(1024, 1024, 64, NF4)
    first = TableWeight(weight.packed[:512], weight.absmax[:16], (1, 1024), 64, NF4)
    assert np.array_equal(weight.dequantize()[:1].numpy(), first.dequantize().numpy())


@pytest.mark.parametrize("quant_type", [FP4, NF4])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (96, 64)])
def test_onnxruntime_decodes_the_same_values(columns: int, block_size: int, quant_type: int) -> None:
    """x @ Wᵀ with the rows of a unit matrix as x are the columns of W."""
    weight = drawn(32, columns, block_size, quant_type)
    node = onnx.helper.make_node(
        "MatMulBnb4", ["x", "packed", "absmax"], ["y"], domain="com.microsoft",
        K=columns, N=32, block_size=block_size, quant_type=quant_type,
    )  # fmt: skip
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [columns, width])
        for name, width in (("x", columns), ("y", 32))
    ]
    constants = [
        onnx.numpy_helper.from_array(weight.packed, "packed"),
        onnx.numpy_helper.from_array(weight.absmax, "absmax"),
    ]
    graph = onnx.helper.make_graph([node], "product", values[:1], values[1:], constants)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]
    np.testing.assert_allclose(got.T, weight.dequantize().numpy(), rtol=1e-6, atol=0)
