"""ONNX files that compute in 16 bits, with inputs and outputs in 32 or in 16."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16

import edgepeft
from edgepeft.exporters.passes.weights.widen_floats import widen_floats

IDS = np.arange(24).reshape(2, 12) % 300 + 3


@pytest.mark.parametrize(
    ("name", "keep_io_types"), [("bert-script", True), ("bert-script", False), ("llama-script", True)]
)
def test_a_float16_file_runs_and_trains_in_float32(
    files: Callable[[str], Path], name: str, keep_io_types: bool, tmp_path: Path
) -> None:
    """Close to what the file computes, and exactly what it would compute without rounding in between: the
    export compares with both, and the gradients with central differences."""
    path = tmp_path / "model.onnx"
    onnx.save(convert_float_to_float16(onnx.load(files(name)), keep_io_types=keep_io_types), path)
    manifest = edgepeft.export(path, tmp_path / "bundle", bits=32, rank=4)
    assert manifest.verification["outputs"]["no adapter"] < 1e-4
    assert manifest.verification["gradients"]["default"]["resolved_directions"] > 0
    session = ort.InferenceSession(path)
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
    own = session.run(["logits"], {item.name: feeds[item.name] for item in session.get_inputs()})[0]
    with edgepeft.load(tmp_path / "bundle") as device:
        got = device.forward({"input_ids": IDS})["logits"]
    np.testing.assert_allclose(got, own, rtol=0, atol=2e-2 * float(np.abs(own).max()))


def test_everything_in_sixteen_bits_becomes_float32() -> None:
    """Inputs, initializers, casts, constants in attributes and the graphs of branches; integers stay.

    The text has bits: 16256 is 1 in bfloat16, 16384 is 2 in float16.
    """
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        agraph (bfloat16[n] x, bool c, int64[1] size) => (float16[n] y)
        <bfloat16[1] w = {16256}, int64[1] one = {1}> {
            a = Mul(x, w)
            b = Cast<to = 10>(a)
            filled = ConstantOfShape<value = float16[1] {16384}>(size)
            d = Add(b, filled)
            y = If(c) <
                then_branch = then () => (float16[n] p) { p = Cast<to = 10>(d) },
                else_branch = other () => (float16[n] q) { q = Neg(d) }
            >
        }
        """
    )
    assert widen_floats(model)
    assert not widen_floats(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    assert {item.type for item in session.get_inputs()} == {"tensor(float)", "tensor(bool)", "tensor(int64)"}
    feeds = {"x": np.array([1.0003, -2], np.float32), "size": np.array([2])}
    for condition, sign in ((True, 1), (False, -1)):
        (got,) = session.run(None, {**feeds, "c": np.array(condition)})
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, sign * (feeds["x"] + 2))
