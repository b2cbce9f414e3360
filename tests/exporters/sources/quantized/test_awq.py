"""AWQ: against the numbers that were drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.layouts import QuantizedWeight

from . import writers
from .reading import COLUMNS, ROWS, read

SETTINGS: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"
}  # fmt: skip


def drawn(group_size: int = 32) -> writers.Drawn:
    return writers.draw_awq(group_size)(ROWS, COLUMNS, np.random.default_rng(0))


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_weight(tmp_path: Path, group_size: int, zero_point: bool) -> None:
    """Zeros are read whatever the description says of them."""
    made = drawn(group_size)
    weight = read(tmp_path, made.tensors, SETTINGS | {"group_size": group_size, "zero_point": zero_point})
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), made.weight)
    assert weight.block_size == group_size
    assert weight.scales.values.dtype == np.float16


def test_the_order_in_a_word(tmp_path: Path) -> None:
    """0x76543210 holds, row by row, the codes 0 4 1 5 2 6 3 7."""
    tensors = {
        "qweight": torch.full((32, 1), 0x76543210, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(tmp_path, tensors, SETTINGS, (8, 32))
    assert weight.dequantize()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"version": "gemv"}, "has version 'gemv', edgepeft reads gemm"),
        ({"bits": 8}, "has bits 8, edgepeft reads 4"),
        ({"group_size": 64}, r"part\.qzeros has the shape \[4, 3\], expected \[2, 3\]"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        read(tmp_path, drawn().tensors, SETTINGS | settings)
