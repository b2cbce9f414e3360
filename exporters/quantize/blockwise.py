"""Blockwise symmetric quantization of weights, in the layouts that onnxruntime's operators read.

    w[n, k] ≈ (q[n, k] - zero_point) * scale[n, k // block_size]

with q in 0…15 and zero point 8 at 4 bits, q in 0…255 and zero point 128 at 8 bits.
Source: `MatMulNBits` and `GatherBlockQuantized` of com.microsoft, version 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..scratch import spooled

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Fractions of the largest magnitude tried as the range of a 4-bit block; the one with the least squared
#: error wins.
CLIPS_4_BIT = (1.0, 0.95, 0.9, 0.85, 0.8)
#: Weights quantized at a time: a chunk that stays in the cache is ten times faster than a whole embedding.
CHUNK_VALUES = 2**18


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[rows, columns]`: `packed` uint8 `[rows, columns * bits / 8]`, at 4 bits the even column in
    the low half of a byte; `scales` float32 `[rows, blocks]`."""

    packed: np.ndarray
    scales: np.ndarray
    bits: int
    block_size: int

    @classmethod
    def of_codes(
        cls, codes: torch.Tensor, scales: torch.Tensor, bits: int, block_size: int
    ) -> "QuantizedWeight":
        """Of `codes` uint8 `[rows, columns]`, one code a byte."""
        return cls(_packed(codes, bits).numpy(), scales.numpy(), bits, block_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        rows, packed_columns = self.packed.shape
        return rows, packed_columns * 8 // self.bits

    @property
    def zero_point(self) -> int:
        """The code that stands for 0."""
        return int(2 ** (self.bits - 1))

    def dequantize(self) -> torch.Tensor:
        """float32 `[rows, columns]`, as onnxruntime computes it."""
        rows, columns = self.shape
        step = max(1, CHUNK_VALUES // columns)
        return spooled(
            self.shape, torch.float32, (self._decoded(slice(row, row + step)) for row in range(0, rows, step))
        )

    def _decoded(self, rows: slice) -> torch.Tensor:
        scales = self.scales[rows]
        codes = _unpacked(self.packed[rows], self.bits).astype(np.float32)
        blocks = codes.reshape(len(scales), -1, self.block_size) - np.float32(self.zero_point)
        return torch.from_numpy(blocks * scales[:, :, None])


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


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
    scales = torch.empty(len(blocks))
    step = CHUNK_VALUES // block_size

    def packed_chunks() -> Iterator[torch.Tensor]:
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            codes, scales[part] = quantize_blocks(blocks[part], bits)
            yield _packed(codes, bits)

    packed = spooled((rows, columns * bits // 8), torch.uint8, packed_chunks())
    return QuantizedWeight(packed.numpy(), _kept([scales.reshape(rows, -1).numpy()]), bits, block_size)


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same columns, bits and blocks, one below the other."""
    packed, scales = (
        _kept([weight.packed for weight in weights]),
        _kept([weight.scales for weight in weights]),
    )
    return QuantizedWeight(packed, scales, weights[0].bits, weights[0].block_size)


def _kept(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays `[…, columns]` one below the other, in a scratch file."""
    parts = [torch.from_numpy(array) for array in arrays]
    kept = spooled((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype, parts)
    return np.asarray(kept)


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
