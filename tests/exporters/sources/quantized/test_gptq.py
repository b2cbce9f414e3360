"""GPTQ: against the numbers that were drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.layouts import QuantizedWeight, unpack

from . import writers
from .reading import COLUMNS, ROWS, read

SETTINGS: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def drawn(**options: Any) -> writers.Drawn:
    return writers.draw_gptq(**options)(ROWS, COLUMNS, np.random.default_rng(0))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 32), (4, -1)])
def test_every_weight(
    tmp_path: Path, bits: int, group_size: int, version: int, sym: bool, act_order: bool
) -> None:
    made = drawn(bits=bits, group_size=group_size, version=version, sym=sym, act_order=act_order)
    settings = SETTINGS | {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": act_order}
    settings["checkpoint_format"] = {1: "gptq", 2: "gptq_v2"}[version]
    weight = read(tmp_path, made.tensors, settings)
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), made.weight)
    assert (weight.zero_points is None) == sym
    assert (weight.order is None) == (not act_order or group_size == -1)
    assert weight.block_size == (128 if group_size == -1 else group_size)
    assert weight.scales.values.dtype == np.float16


def test_the_codes_of_reordered_columns_stay_what_they_are(tmp_path: Path) -> None:
    """Column j of what is stored is column order[j]; within a group they keep their order."""
    made = drawn(act_order=True)
    weight = read(tmp_path, made.tensors, SETTINGS | {"desc_act": True})
    assert isinstance(weight, QuantizedWeight)
    assert weight.order is not None
    groups = made.tensors["g_idx"].numpy()[weight.order]
    assert groups.tolist() == sorted(groups.tolist())
    for group in range(4):
        members = weight.order[groups == group]
        assert members.tolist() == sorted(members.tolist())
    codes = unpack(weight.packed, 4)
    word = made.tensors["qweight"].numpy().view(np.uint32)
    for place, column in enumerate(weight.order[:20]):
        assert (codes[:, place] == (word[column // 8] >> (4 * (column % 8))) % 16).all()


def test_groups_that_are_no_blocks(tmp_path: Path) -> None:
    """Groups of 48 columns are blocks of 16 with the same scale; a last group may be shorter."""
    made = writers.draw_gptq(group_size=48, sym=False)(ROWS, 112, np.random.default_rng(0))
    weight = read(tmp_path, made.tensors, SETTINGS | {"group_size": 48}, (ROWS, 112))
    assert isinstance(weight, QuantizedWeight)
    assert weight.block_size == 16
    assert torch.equal(weight.dequantize(), made.weight)


def test_groups_larger_than_all_blocks(tmp_path: Path) -> None:
    made = writers.draw_gptq(group_size=-1)(8, 1024, np.random.default_rng(0))
    weight = read(tmp_path, made.tensors, SETTINGS | {"group_size": -1}, (8, 1024))
    assert isinstance(weight, QuantizedWeight)
    assert weight.block_size == 128
    assert torch.equal(weight.dequantize(), made.weight)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": 3}, "has bits 3, edgepeft reads 4 and 8"),
        ({"bits": True}, "has bits True"),
        ({"bits": 8}, r"part\.qweight has the shape \[16, 24\], expected \[32, 24\]"),
        ({"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'"),
        ({"format": "gptq_p"}, "has format 'gptq_p'"),
        ({"group_size": 64}, r"part\.scales has the shape \[4, 24\], expected \[2, 24\]"),
        ({"group_size": None}, r"has group_size None \(of part\)"),
        ({"group_size": 0}, "has group_size 0"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=f"^{tmp_path}: .*{reason}.*export the float model"):
        read(tmp_path, drawn().tensors, SETTINGS | settings)


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("qzeros", None, r"part\.qzeros is not there"),
        ("scales", torch.zeros(4, ROWS, dtype=torch.int32), "is stored as I32, expected F16 or BF16 or F32"),
        ("g_idx", torch.full((COLUMNS,), 4, dtype=torch.int32), r"names groups outside 0…3"),
        ("g_idx", torch.zeros(3, dtype=torch.int32), r"has the shape \[3\], expected \[128\]"),
        ("g_idx", None, "is not there, and desc_act says"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, part: str, tensor: torch.Tensor | None, reason: str) -> None:
    tensors = drawn().tensors
    del tensors[part]
    if tensor is not None:
        tensors[part] = tensor
    with pytest.raises(ExportError, match=reason):
        read(tmp_path, tensors, SETTINGS | {"desc_act": True})


def test_groups_without_blocks_of_16(tmp_path: Path) -> None:
    made = writers.draw_gptq(group_size=8)(ROWS, COLUMNS, np.random.default_rng(0))
    with pytest.raises(ExportError, match="part has 128 columns in groups that blocks of 16 do not divide"):
        read(tmp_path, made.tensors, SETTINGS | {"group_size": 8})
