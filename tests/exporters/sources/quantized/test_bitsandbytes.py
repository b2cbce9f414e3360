"""bitsandbytes: against the numbers that were drawn, and against bitsandbytes where it is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.quantize.layouts import QuantizedWeight
from edgepeft.exporters.quantize.table_weight import FP4, NF4, TABLES, TableWeight

from .reading import COLUMNS, ROWS, read

NF4_SETTINGS: dict[str, Any] = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"
}  # fmt: skip
INT8_SETTINGS: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = "weight.quant_state.bitsandbytes__"


def of_text(value: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def drawn_table(
    kind: str = "nf4", *, nested: bool = False, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors and the weight, value by value: the first code of a byte is in its high half."""
    rng = np.random.default_rng(0)
    count = rows * columns
    codes = rng.integers(0, 16, count)
    table = TABLES[{"nf4": NF4, "fp4": FP4}[kind]]
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16"}
    state["shape"] = [rows, columns]
    tensors = {
        "weight": torch.tensor([[16 * a + b] for a, b in codes.reshape(-1, 2).tolist()], dtype=torch.uint8),
        "weight.quant_map": torch.from_numpy(table),
    }
    blocks = count // 64
    if nested:
        levels = rng.integers(0, 256, blocks)
        values = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        factors = rng.uniform(0.1, 0.2, -(-blocks // 32)).astype(np.float32)
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.5}
        tensors["weight.absmax"] = torch.from_numpy(levels.astype(np.uint8))
        tensors["weight.nested_quant_map"] = torch.from_numpy(values)
        tensors["weight.nested_absmax"] = torch.from_numpy(factors)
        absmax = np.array(
            [values[level] * factors[block // 32] + np.float32(0.5) for block, level in enumerate(levels)]
        )
    else:
        absmax = rng.uniform(0.5, 1, blocks).astype(np.float32)
        tensors["weight.absmax"] = torch.from_numpy(absmax)
    tensors[f"{STATE}{kind}"] = of_text(state)
    weight = np.array([table[code] * absmax[place // 64] for place, code in enumerate(codes)], np.float32)
    return tensors, weight.reshape(rows, columns)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_weight_of_4_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    tensors, expected = drawn_table(kind, nested=nested)
    weight = read(tmp_path, tensors, NF4_SETTINGS | {"bnb_4bit_quant_type": kind})
    assert isinstance(weight, TableWeight)
    assert np.array_equal(weight.dequantize().numpy(), expected)
    assert np.array_equal(weight.packed, tensors["weight"].numpy().reshape(-1))


def test_bytes_that_are_stored_as_another_type(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`, which FSDP wants to be a float."""
    tensors, expected = drawn_table()
    tensors["weight"] = tensors["weight"].reshape(-1).view(torch.bfloat16).reshape(-1, 1)
    assert np.array_equal(read(tmp_path, tensors, NF4_SETTINGS).dequantize().numpy(), expected)


def drawn_int8(
    rng: np.random.Generator, *, rows: int = ROWS, columns: int = COLUMNS, largest: float = 1
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The tensors, and the weight in float64, whose rows are at most `largest`."""
    values = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = rng.uniform(0.1, largest, rows).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(values),
        "SCB": torch.from_numpy(scales),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, values.astype(np.float64) * scales.astype(np.float64)[:, None] / 127


def test_every_weight_of_8_bits(tmp_path: Path) -> None:
    tensors, expected = drawn_int8(np.random.default_rng(0))
    values = tensors["weight"].numpy()
    weight = read(tmp_path, tensors, INT8_SETTINGS)
    assert isinstance(weight, QuantizedWeight)
    assert np.array_equal(weight.packed.astype(int) - 128, values)
    np.testing.assert_allclose(weight.dequantize().numpy(), expected, rtol=2e-7)
    tensors["weight_format"] = torch.tensor(1, dtype=torch.uint8)
    with pytest.raises(ExportError, match="weight_format is not 0"):
        read(tmp_path, tensors, INT8_SETTINGS)


def state(**changes: Any) -> torch.Tensor:
    return of_text({"quant_type": "nf4", "blocksize": 64, "shape": [ROWS, COLUMNS]} | changes)


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        ("weight", torch.zeros(5, 1, dtype=torch.uint8), "has 5 bytes, expected 1536"),
        ("weight.absmax", None, r"part\.weight\.absmax is not there"),
        ("weight.quant_map", torch.linspace(-1, 1, 16), "is another table than bitsandbytes'"),
        (f"{STATE}nf4", torch.zeros(4, dtype=torch.uint8), "is no JSON"),
        (f"{STATE}nf4", of_text([1]), "is no JSON object"),
        (f"{STATE}nf4", state(shape=[8, 8]), r"has the shape \[8, 8\] in blocks of 64, expected \[24, 128\]"),
        (f"{STATE}nf4", state(blocksize=48), "in blocks of 48"),
        (f"{STATE}nf4", state(blocksize=4096), "has 3072 weights, which blocks of 4096 do not divide"),
        ("weight.nested_absmax", torch.zeros(1), "is nested in blocks of None"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, part: str, tensor: torch.Tensor | None, reason: str) -> None:
    tensors, _ = drawn_table()
    tensors.pop(part, None)
    if tensor is not None:
        tensors[part] = tensor
    with pytest.raises(ExportError, match=reason):
        read(tmp_path, tensors, NF4_SETTINGS)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_packs(tmp_path: Path, kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    packed, made = functional.quantize_4bit(
        torch.randn(ROWS, COLUMNS), quant_type=kind, compress_statistics=nested
    )
    tensors = {f"weight.{name}": tensor for name, tensor in made.as_dict(packed=True).items()}
    weight = read(tmp_path, tensors | {"weight": packed}, NF4_SETTINGS | {"bnb_4bit_quant_type": kind})
    assert torch.equal(weight.dequantize(), functional.dequantize_4bit(packed, made))
