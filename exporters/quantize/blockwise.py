"""Blockwise symmetric quantization of weights, in the layouts that onnxruntime's operators read.

    w[n, k] ≈ (q[n, k] - zero_point) * scale[n, k // block_size]

with q in 0…15 and zero point 8 at 4 bits, q in 0…255 and zero point 128 at 8 bits.
Source: `MatMulNBits` and `GatherBlockQuantized` of com.microsoft, version 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Fractions of the largest magnitude tried as the range of a 4-bit block; the one with the least squared
#: error wins.
CLIPS_4_BIT = (1.0, 0.95, 0.9, 0.85, 0.8)
#: Weights quantized at a time: a chunk that stays in the cache is ten times faster than a whole embedding.
CHUNK_VALUES = 2**18


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[rows, columns]`: `codes` uint8 `[rows, columns]`, one code a byte; `scales` float32 `[rows,
    blocks]`."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block_size: int

    @property
    def zero_point(self) -> int:
        """The code that stands for 0."""
        return int(2 ** (self.bits - 1))

    def packed(self) -> np.ndarray:
        """uint8 `[rows, columns * bits / 8]`; at 4 bits the even column is the low half of a byte."""
        if self.bits == 8:
            return self.codes
        return np.asarray(self.codes[:, 0::2] | (self.codes[:, 1::2] << 4), np.uint8)

    def dequantize(self) -> np.ndarray:
        """float32 `[rows, columns]`, as onnxruntime computes it."""
        rows, columns = self.codes.shape
        blocks = self.codes.astype(np.float32).reshape(rows, -1, self.block_size) - np.float32(
            self.zero_point
        )
        weights: np.ndarray = (blocks * self.scales[:, :, None]).reshape(rows, columns)
        return weights


def can_quantize(columns: int, block_size: int) -> bool:
    """Whether blocks of `block_size` divide a row of `columns` weights."""
    return columns % block_size == 0


def quantize(weight: torch.Tensor, bits: int, block_size: int) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`, whose columns `block_size` divides.

    At 8 bits the scale is the largest magnitude / 127. At 4 bits the signed extreme of a block is given the
    code 0 (-8), which uses all 16 codes, and several clippings of the range compete.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(-1, block_size)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    scales = torch.empty(len(blocks))
    step = CHUNK_VALUES // block_size
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        codes[part], scales[part] = quantize_blocks(blocks[part], bits)
    return QuantizedWeight(
        codes.reshape(rows, columns).numpy(), scales.reshape(rows, -1).numpy(), bits, block_size
    )


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same columns, bits and blocks, one below the other."""
    codes = np.concatenate([weight.codes for weight in weights])
    scales = np.concatenate([weight.scales for weight in weights])
    return QuantizedWeight(codes, scales, weights[0].bits, weights[0].block_size)


def quantize_blocks(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[blocks, block_size]` and scales float32 `[blocks]` of float32 `[blocks, block_size]`."""
    extreme = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    if bits == 8:
        scale = extreme.abs() / 127
        return (round_to_levels(blocks, scale, 8) + 128).to(torch.uint8), scale.squeeze(1)
    best = extreme / -8
    levels = round_to_levels(blocks, best, 4)
    error = _squared_error(blocks, levels, best)
    for clip in CLIPS_4_BIT[1:]:
        scale = extreme * clip / -8
        candidate = round_to_levels(blocks, scale, 4)
        candidate_error = _squared_error(blocks, candidate, scale)
        better = candidate_error < error
        levels = torch.where(better, candidate, levels)
        best = torch.where(better, scale, best)
        error = torch.minimum(error, candidate_error)
    return (levels + 8).to(torch.uint8), best.squeeze(1)


def round_to_levels(blocks: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers, as floats, that times `scale` come nearest; all 0 where the scale is."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    half = 2 ** (bits - 1)
    return (blocks * inverse).round_().clamp_(-half, half - 1)


def _squared_error(blocks: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (levels * scale).sub_(blocks).square_().sum(dim=1, keepdim=True)
