"""mlx-lm: against the numbers that were drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.layouts import QuantizedWeight

from . import writers
from .reading import COLUMNS, ROWS, read

SETTINGS: dict[str, Any] = {"group_size": 32, "bits": 4}


def drawn(bits: int = 4, group_size: int = 32) -> writers.Drawn:
    return writers.draw_mlx(bits, group_size)(ROWS, COLUMNS, np.random.default_rng(0))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 128)])
def test_every_weight(tmp_path: Path, bits: int, group_size: int) -> None:
    """Up to float32's rounding: the middle code's value is computed first."""
    made = drawn(bits, group_size)
    weight = read(
        tmp_path, made.tensors, SETTINGS | {"bits": bits, "group_size": group_size, "mode": "affine"}
    )
    assert isinstance(weight, QuantizedWeight)
    assert (weight.bits, weight.block_size, weight.zero_points) == (bits, group_size, None)
    torch.testing.assert_close(weight.dequantize(), made.weight, rtol=0, atol=5e-7)
    assert np.array_equal(weight.packed, made.tensors["weight"].numpy().view(np.uint8))


def test_a_module_with_settings_of_its_own(tmp_path: Path) -> None:
    made = drawn(8, 64)
    weight = read(tmp_path, made.tensors, SETTINGS | {"part": {"bits": 8, "group_size": 64}})
    torch.testing.assert_close(weight.dequantize(), made.weight, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "mxfp4"}, "has mode 'mxfp4', edgepeft reads affine"),
        ({"bits": 6}, "has bits 6"),
        ({"part": {"bits": 3}}, "has bits 3"),
        ({"bits": 8}, r"part\.weight has the shape \[24, 16\], expected \[24, 32\]"),
        ({"group_size": 64}, r"part\.scales has the shape \[24, 4\], expected \[24, 2\]"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        read(tmp_path, drawn().tensors, SETTINGS | settings)


def test_biases_that_are_missing(tmp_path: Path) -> None:
    tensors = drawn().tensors
    del tensors["biases"]
    with pytest.raises(ExportError, match=r"part\.biases is not there"):
        read(tmp_path, tensors, SETTINGS)
