"""Blockwise symmetric rounding of weights (see `layouts`): zero point 8 at 4 bits, 128 at 8."""

from collections.abc import Iterator

import torch

from ..scratch import spooled
from .layouts import CHUNK_VALUES, BlockValues, QuantizedWeight, kept, pack

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Fractions of the largest magnitude tried as the range of a 4-bit block; the one with the least squared
#: error wins.
CLIPS_4_BIT = (1.0, 0.95, 0.9, 0.85, 0.8)


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
            yield torch.from_numpy(pack(codes.numpy(), bits))

    packed = spooled((rows, columns * bits // 8), torch.uint8, packed_chunks())
    stored = BlockValues(kept([scales.reshape(rows, -1).numpy()]))
    return QuantizedWeight(packed.numpy(), stored, bits, block_size)


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
