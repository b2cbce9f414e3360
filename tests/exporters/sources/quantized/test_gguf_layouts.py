"""Blocks of GGUF files as they are stored, against the package gguf."""

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edgepeft.exporters.sources.quantized.gguf_layouts import has_layout, quantized_weight

pytestmark = pytest.mark.versions

#: Types that the package quantizes to.
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
#: Bytes of a block that are float16s, by the first of each; all others may be what they like.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
#: Bits of a weight as it is kept: codes and all numbers of the blocks.
BITS_A_WEIGHT = {
    "Q4_0": 4.5,
    "Q4_1": 5.25,
    "Q5_0": 8.5,
    "Q5_1": 9.25,
    "Q8_0": 8.5,
    "Q2_K": 4 + 24 / 16 + 2 * 16 / 256,
    "Q3_K": 4 + 8 / 16 + 16 / 256,
    "Q4_K": 4 + 24 / 32 + 2 * 16 / 256,
    "Q5_K": 8 + 24 / 32 + 2 * 16 / 256,
    "Q6_K": 8 + 8 / 16 + 16 / 256,
    "IQ4_NL": 8.5,
    "IQ4_XS": 8 + 8 / 32 + 16 / 256,
}


def random_blocks(name: str, rows: int, columns: int, deviation: float = 0.02) -> np.ndarray:
    """Any bytes, but scales that are finite, some of them 0 and some negative: uint8 `[rows, bytes]`.

    Args:
        name: of the type.
        rows: of the weight.
        columns: of the weight.
        deviation: of the scales, which are normally distributed.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    generator = np.random.default_rng(rows * columns)
    blocks = generator.integers(0, 256, (rows, columns // block, size), np.uint8)
    for first in HALVES[name]:
        halves = generator.normal(0, deviation, blocks.shape[:2]).astype(np.float16)
        halves.reshape(-1)[::5] = 0
        blocks[..., first : first + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", HALVES)
def test_every_bit_pattern_is_the_packages(name: str) -> None:
    """No difference at all, in rows of which several chunks are made."""
    stored = random_blocks(name, 300, 1280)
    weight = quantized_weight(stored, GGMLQuantizationType[name])
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType[name])
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)
    assert weight.shape == expected.shape
    numbers = [weight.packed, weight.scales.values, weight.scales.factors, weight.zero_points]
    if weight.minimums is not None:
        numbers += [weight.minimums.values, weight.minimums.factors]
    bits = 8 * sum(array.nbytes for array in numbers if array is not None)
    assert bits / expected.size == BITS_A_WEIGHT[name]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_package_quantized_is_kept(name: str) -> None:
    values = np.random.default_rng(1).normal(0, 0.05, (24, 128)).astype(np.float32)
    stored = gguf.quants.quantize(values, GGMLQuantizationType[name])
    weight = quantized_weight(stored, GGMLQuantizationType[name])
    np.testing.assert_array_equal(
        weight.dequantize().numpy(), gguf.quants.dequantize(stored, GGMLQuantizationType[name])
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_rows_are_put_in_order(name: str) -> None:
    stored = random_blocks(name, 700, 512)
    order = np.random.default_rng(2).permutation(700)
    weight = quantized_weight(stored, GGMLQuantizationType[name], order)
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType[name])[order]
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


def test_floats_and_other_types_have_no_layout() -> None:
    assert {kind.name for kind in GGMLQuantizationType if has_layout(kind)} == HALVES.keys()


@pytest.mark.parametrize("name", HALVES)
def test_a_row_of_a_mapped_file(name: str) -> None:
    """Which nobody may write to: no warning of PyTorch's."""
    stored = random_blocks(name, 1, 256)
    stored.flags.writeable = False
    weight = quantized_weight(stored, GGMLQuantizationType[name])
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType[name])
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)
