"""Rounding in blocks, against a search of all scales and zero points, and against the operator's own rule."""

import numpy as np
import pytest
import torch

from edgepeft.exporters.quantize.blockwise import fit_blocks, quantize, stored_bytes


def best_error(block: np.ndarray, importance: np.ndarray) -> float:
    """The least weighted squared error that some scale of many and some zero point leave."""
    spread = block.max() - block.min()
    errors = []
    for zero_point in range(16):
        for scale in np.linspace(0.5, 1.6, 400) * spread / 15:
            codes = np.clip(np.round(block / scale) + zero_point, 0, 15)
            errors.append(float((importance * ((codes - zero_point) * scale - block) ** 2).sum()))
    return min(errors)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.03, 0.2])
def test_a_block_is_nearly_as_near_as_it_can_be(shift: float, weighted: bool) -> None:
    """All signs, most of one sign, all of one sign: at most an eighth above the best of all, on average."""
    generator = torch.Generator().manual_seed(0)
    blocks = 0.05 * torch.randn(24, 32, generator=generator) + shift
    importance = torch.rand(32, generator=generator) ** 3 + 1e-3 if weighted else torch.ones(32)
    scale, zero_point = fit_blocks(blocks, 4, torch.float32, importance if weighted else None)
    codes = (blocks / scale[:, None]).round().add(zero_point[:, None]).clamp(0, 15)
    errors = (importance * ((codes - zero_point[:, None]) * scale[:, None] - blocks).square()).sum(1)
    best = [best_error(block.numpy(), importance.numpy()) for block in blocks]
    assert float(errors.sum()) < 1.125 * sum(best)


def test_zero_points_and_least_squares_beat_ggmls_symmetric_rule() -> None:
    """Q4_0: the signed extreme of a block has the code 0, zero the code 8."""
    weight = 0.04 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    blocks = weight.reshape(-1, 32)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    q4_0 = (blocks / scale).round().clamp(-8, 7) * scale
    ours = quantize(weight, 4, 32)
    lost = (ours.dequantize() - weight).square().sum()
    assert float(lost) < 0.85 * float((q4_0 - blocks).square().sum())
    assert ours.nbytes == stored_bytes(64, 512, 4, 32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("size", "dtype"), [(1.0, np.float16), (5e-3, np.float16), (1e-6, np.float32), (1e7, np.float32)]
)
def test_scales_are_halves_where_those_hold_them(bits: int, size: float, dtype: type) -> None:
    """And weights lose no more by it."""
    weight = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    found = quantize(weight, bits, 32)
    assert found.scales.values.dtype == dtype
    lost = (found.dequantize() - weight).norm() / weight.norm()
    assert float(lost) < {4: 0.09, 8: 0.007}[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_zeros_and_of_one_value(bits: int) -> None:
    weight = torch.zeros(3, 64)
    weight[1, :32], weight[2, 32:] = 0.5, -0.25
    torch.testing.assert_close(quantize(weight, bits, 32).dequantize(), weight, atol=2e-3, rtol=0)
    nothing = quantize(torch.zeros(2, 32), bits, 32)
    assert not nothing.dequantize().any()


def test_what_matters_more_is_nearer() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:8] = 100
    plain, weighted = (quantize(weight, 4, 32, each).dequantize() for each in (None, importance))

    def lost(found: torch.Tensor) -> float:
        return float((importance * (found - weight).square()).sum())

    assert lost(weighted) < 0.8 * lost(plain)
