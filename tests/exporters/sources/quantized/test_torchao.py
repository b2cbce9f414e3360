"""torchao: against the numbers that were drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.layouts import QuantizedWeight
from edgepeft.exporters.sources.quantized.tensors import CheckpointTensors
from edgepeft.exporters.sources.quantized.torchao import TorchaoLayout

from . import writers
from .reading import COLUMNS, ROWS


def drawn(
    bits: int = 8, size: int = COLUMNS, *, sym: bool = True, rows: int = ROWS, columns: int = COLUMNS
) -> writers.Drawn:
    rng = np.random.default_rng(0)
    count, half = columns // size, 2 ** (bits - 1)
    values = rng.integers(-half, half, (rows, columns))
    zeros = np.zeros((rows, count), int) if sym else rng.integers(-half, half, (rows, count))
    scales = rng.uniform(0.01, 0.02, (rows, count)).astype(np.float32)
    tensors = {
        "_weight_qdata": torch.from_numpy(values.astype(np.int8)),
        "_weight_scale": torch.from_numpy(scales),
        "_weight_zero_point": torch.from_numpy(zeros.astype(np.int8)),
    }
    return writers.Drawn(tensors, writers.per_group(values, np.arange(columns) // size, scales, zeros))


def noted(kind: str, **attributes: Any) -> str:
    return json.dumps({"_type": kind, "_data": attributes, "_tensor_data_names": ["qdata", "scale"]})


def read(folder: Path, tensors: dict[str, torch.Tensor], note: str | None) -> QuantizedWeight:
    stored = {f"part.{name}": tensor for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({} if note is None else {"part.weight": note})
    save_file(stored, folder / "model.safetensors", metadata=metadata)
    layout = TorchaoLayout(CheckpointTensors(folder), {"quant_method": "torchao"})
    assert layout.modules() == ["part"]
    return layout.weight("part", (ROWS, COLUMNS))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(8, COLUMNS), (8, 32), (4, 32)])
def test_every_weight(tmp_path: Path, bits: int, size: int, sym: bool) -> None:
    made = drawn(bits, size, sym=sym)
    target = {"_type": "torch.dtype", "_data": f"int{bits}"}
    note = noted("IntxUnpackedToInt8Tensor", block_size=[1, size], target_dtype=target)
    if size == COLUMNS:
        note = noted("Int8Tensor", block_size=[1, size])
    weight = read(tmp_path, made.tensors, note)
    assert (weight.bits, weight.block_size) == (bits, size)
    assert (weight.zero_points is None) == sym
    assert torch.equal(weight.dequantize(), made.weight)


def test_symmetric_weights_may_have_no_zero_points(tmp_path: Path) -> None:
    made = drawn()
    del made.tensors["_weight_zero_point"]
    weight = read(tmp_path, made.tensors, noted("Int8Tensor", block_size=[1, COLUMNS]))
    assert torch.equal(weight.dequantize(), made.weight)


INT4 = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}}


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (None, r"part\.weight is not described in the header"),
        ("[]", r"part\.weight is not described in the header"),
        (noted("Int4Tensor"), r"has a Int4Tensor \(part\.weight\), edgepeft reads Int8Tensor and Intx"),
        (noted("Int8Tensor", block_size=[2, 32]), r"is in blocks of \[2, 32\], expected some of one row"),
        (noted("Int8Tensor"), "is in blocks of None"),
        (noted("Int8Tensor", block_size=[1, 64]), r"has the shape \[24, 1\], expected \[24, 2\]"),
        (noted("Int8Tensor", block_size=[1, COLUMNS], **INT4), "holds integers outside -8…7"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, note: str | None, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        read(tmp_path, drawn().tensors, note)
