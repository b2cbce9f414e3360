"""compressed-tensors: against the numbers that were drawn, and its library where that is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.layouts import QuantizedWeight

from . import writers
from .reading import COLUMNS, ROWS, read


def settings(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme | weights}},
        "ignore": ["lm_head"],
    }


def drawn(
    bits: int = 4,
    size: int = 32,
    *,
    sym: bool = True,
    reordered: bool = False,
    plain: bool = False,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> writers.Drawn:
    """Packed, or `plain` int8, whose integers are signed; packed ones have 2^(bits - 1) added."""
    rng = np.random.default_rng(0)
    count, half = columns // size, 2 ** (bits - 1)
    values = rng.integers(-half, half, (rows, columns))
    zeros = np.zeros((rows, count), int) if sym else rng.integers(-half, half, (rows, count))
    scales = torch.from_numpy(rng.uniform(0.01, 0.02, (rows, count))).bfloat16()
    groups = np.arange(columns) // size
    tensors = {"weight_scale": scales}
    if reordered:
        groups = rng.permutation(groups)
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    if plain:
        tensors["weight"] = torch.from_numpy(values.astype(np.int8))
    else:
        tensors["weight_packed"] = writers.words(values + half, bits)
        tensors["weight_shape"] = torch.tensor([rows, columns])
    if not sym:
        signed = torch.from_numpy(zeros.astype(np.int8))
        tensors["weight_zero_point"] = signed if plain else writers.words(zeros.T + half, bits).T
    return writers.Drawn(tensors, writers.per_group(values, groups, scales.float().numpy(), zeros))


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 64), (4, COLUMNS)])
def test_every_packed_weight(tmp_path: Path, bits: int, size: int, sym: bool, reordered: bool) -> None:
    made = drawn(bits, size, sym=sym, reordered=reordered)
    strategy = {"strategy": "channel", "group_size": None} if size == COLUMNS else {"group_size": size}
    weight = read(tmp_path, made.tensors, settings(num_bits=bits, symmetric=sym, **strategy))
    assert isinstance(weight, QuantizedWeight)
    assert (weight.bits, weight.block_size) == (bits, size)
    assert (weight.zero_points is None, weight.order is None) == (sym, not reordered or size == COLUMNS)
    assert torch.equal(weight.dequantize(), made.weight)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_plain_weight(tmp_path: Path, bits: int, sym: bool) -> None:
    """int8, whether they have 8 bits or are fewer, with a scale a row."""
    made = drawn(bits, COLUMNS, sym=sym, plain=True)
    weight = read(
        tmp_path, made.tensors, settings("int-quantized", num_bits=bits, strategy="channel", symmetric=sym)
    )
    assert isinstance(weight, QuantizedWeight)
    assert weight.bits == 8
    assert torch.equal(weight.dequantize(), made.weight)


def test_one_scale_for_all(tmp_path: Path) -> None:
    """The strategy of old files, which do not name it, follows from the size of the groups."""
    made = drawn(8, COLUMNS, plain=True)
    made.tensors["weight_scale"] = torch.tensor([0.5])
    weight = read(
        tmp_path, made.tensors, settings("int-quantized", num_bits=8, strategy=None, group_size=None)
    )
    assert torch.equal(weight.dequantize(), made.tensors["weight"].float() * 0.5)


def test_groups_that_were_never_noted(tmp_path: Path) -> None:
    made = drawn()
    made.tensors["weight_g_idx"] = torch.full((COLUMNS,), -1, dtype=torch.int32)
    assert torch.equal(read(tmp_path, made.tensors, settings()).dequantize(), made.weight)


def test_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    """Older versions of the library left them as int8."""
    made = drawn(sym=False)
    made.tensors["weight_zero_point"] = drawn(sym=False, plain=True).tensors["weight_zero_point"]
    weight = read(tmp_path, made.tensors, settings(symmetric=False))
    assert torch.equal(weight.dequantize(), made.weight)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            settings("float-quantized", num_bits=8, type="float"),
            "has format 'float-quantized', edgepeft reads",
        ),
        (settings(num_bits=8, type="float"), "weights of type float with 8 bits a group"),
        (settings(num_bits=2), "weights of type int with 2 bits"),
        (settings(num_bits=8), "has 16 words for 128 columns, which are not \\[8\\] bits each"),
        (settings(strategy="block"), "4 bits a block"),
        (settings(group_size=64), r"has 4 groups for 128 columns, expected groups of \{64\}"),
        (settings() | {"config_groups": {}}, r"config_groups \{\}"),
        (settings() | {"config_groups": {"group_0": {"weights": None}}}, "a group without weights"),
        (settings() | {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        (settings() | {"transform_config": {"config_groups": {"u": {}}}}, "has a transform_config"),
        (settings() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "has a sparsity_config"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=f"{reason}.*export the float model"):
        read(tmp_path, drawn().tensors, changed)


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("weight_shape", torch.tensor([8, 8]), r"is \[8, 8\], expected \[24, 128\]"),
        ("weight_shape", None, r"part\.weight_shape is not there"),
        ("weight_packed", None, r"part\.weight is not there"),
        ("weight_g_idx", torch.arange(COLUMNS, dtype=torch.int32) - 1, "names groups outside 0…3"),
        ("weight_zero_point", torch.zeros(3, dtype=torch.int8), r"has the shape \[3\], expected \[24, 4\]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, part: str, tensor: torch.Tensor | None, reason: str) -> None:
    tensors = drawn().tensors
    tensors.pop(part, None)
    if tensor is not None:
        tensors[part] = tensor
    with pytest.raises(ExportError, match=reason):
        read(tmp_path, tensors, settings())


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(
    ("bits", "strategy", "size"), [(4, "group", 32), (4, "channel", None), (8, "group", 64)]
)
def test_what_the_library_packs(
    tmp_path: Path, bits: int, strategy: str, size: int | None, sym: bool
) -> None:
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    arguments = schemes.QuantizationArgs(num_bits=bits, symmetric=sym, strategy=strategy, group_size=size)
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments)
    made = drawn(bits, size or COLUMNS, sym=sym, plain=True)
    state = {"weight": made.weight, "weight_scale": made.tensors["weight_scale"].float()}
    if not sym:
        state["weight_zero_point"] = made.tensors["weight_zero_point"]
    packed = packing.PackedQuantizationCompressor.compress(state, scheme)
    weight = read(
        tmp_path, packed, settings(num_bits=bits, symmetric=sym, strategy=strategy, group_size=size)
    )
    assert torch.equal(
        weight.dequantize(), packing.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    )
