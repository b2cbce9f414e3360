"""Blockwise symmetric quantization of weights, in the layouts that onnxruntime's operators read.

    w[n, k] ≈ (q[n, k] - zero_point) * scale[n, k // block_size]

with q in 0…15 and zero point 8 at 4 bits, q in 0…255 and zero point 128 at 8 bits.
Source: `MatMulNBits` and `GatherBlockQuantized` of com.microsoft, version 1.
"""

from dataclasses import dataclass

import numpy as np
import torch

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Fractions of the largest magnitude tried as the range of a 4-bit block; the one with the least squared error wins.
CLIPS_4_BIT = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[rows, columns]`: `codes` uint8 `[rows, columns]`, one code a byte; `scales` float32 `[rows, blocks]`."""

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
        return (self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)).astype(np.uint8)

    def dequantize(self) -> np.ndarray:
        """float32 `[rows, columns]`, as onnxruntime computes it."""
        rows, columns = self.codes.shape
        blocks = self.codes.astype(np.float32).reshape(rows, -1, self.block_size) - np.float32(self.zero_point)
        return (blocks * self.scales[:, :, None]).reshape(rows, columns)


def can_quantize(columns: int, block_size: int) -> bool:
    """Whether blocks of `block_size` divide a row of `columns` weights."""
    return columns % block_size == 0


def quantize(weight: torch.Tensor, bits: int, block_size: int) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`, whose columns `block_size` divides.

    At 8 bits the scale is the largest magnitude / 127. At 4 bits the signed extreme of a block is given the code 0
    (-8), which uses all 16 codes, and several clippings of the range compete.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, columns // block_size, block_size)
    extreme = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    if bits == 8:
        codes, scales = _encode(blocks, extreme.abs() / 127, 8)
    else:
        codes, scales = _encode(blocks, extreme / -8, 4)
        error = _squared_error(blocks, codes, scales, 8)
        for clip in CLIPS_4_BIT[1:]:
            candidate, candidate_scales = _encode(blocks, extreme * clip / -8, 4)
            candidate_error = _squared_error(blocks, candidate, candidate_scales, 8)
            better = candidate_error < error
            codes = torch.where(better[:, :, None], candidate, codes)
            scales = torch.where(better, candidate_scales, scales)
            error = torch.minimum(error, candidate_error)
    return QuantizedWeight(codes.reshape(rows, columns).numpy(), scales.numpy(), bits, block_size)


def _encode(blocks: torch.Tensor, scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    zero_point = 2 ** (bits - 1)
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    codes = torch.round(blocks * inverse[:, :, None]) + zero_point
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8), scales


def _squared_error(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zero_point: int) -> torch.Tensor:
    return (((codes.float() - zero_point) * scales[:, :, None] - blocks) ** 2).sum(dim=2)
