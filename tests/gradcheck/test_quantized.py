"""The backward pass keeps quantized weights quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgepeft.exporters.autodiff import differentiate

from .cases.arrays import integers, normal
from .cases.quantized import pack

FLOAT = ir.TensorType(ir.DataType.FLOAT)
ROWS, COLUMNS, BLOCK = 64, 128, 32


def _graph() -> ir.Graph:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="quantized")
    x = ir.Value(name="x", shape=ir.Shape(["batch", COLUMNS]), type=FLOAT)
    graph.inputs.append(x)
    packed = pack(integers(0, 16, ROWS, COLUMNS), 4, BLOCK)
    scales = np.abs(normal(ROWS, COLUMNS // BLOCK)).astype(np.float32)
    constants = []
    for name, array in (("packed", packed), ("scales", scales)):
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        constants.append(value)
    y = ir.Value(shape=ir.Shape(["batch", ROWS]), type=FLOAT)
    attributes = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": BLOCK}
    graph.append(ir.node("MatMulNBits", [x, *constants], attributes, domain="com.microsoft", outputs=[y]))
    loss = ir.Value(name="loss", shape=ir.Shape([]), type=FLOAT)
    graph.append(ir.node("ReduceSumSquare", [y], {"keepdims": 0}, outputs=[loss]))
    gradient = differentiate(graph, loss, [x])[x]
    gradient.name = "gradient"
    graph.outputs.extend([loss, gradient])
    return graph


def test_the_packed_bytes_are_read_again_not_copied() -> None:
    graph = _graph()
    packed = graph.initializers["packed"].const_value
    again = [
        value.const_value
        for value in graph.initializers.values()
        if value.name != "packed"
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.UINT8
    ]
    assert packed is not None
    assert len(again) == 1
    assert np.shares_memory(again[0].numpy(), packed.numpy())


def test_constant_folding_does_not_write_out_the_weight(tmp_path: Path) -> None:
    """Even in a session that folds constants, the only copy of the weight is the packed one."""
    path = tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = ir.to_proto(ir.Model(_graph(), ir_version=11)).SerializeToString()
    onnxruntime.InferenceSession(model, options)
    optimized = onnx.load(path)
    sizes = {
        tensor.name: int(np.prod(tensor.dims))
        for tensor in optimized.graph.initializer
        if tensor.data_type == 1
    }
    assert max(sizes.values()) < ROWS * COLUMNS
    assert any(node.op_type == "GatherBlockQuantized" for node in optimized.graph.node)
