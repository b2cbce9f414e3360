"""Rounding weights in blocks (see `layouts`): at 4 bits with integer zero points, at 8 symmetrically.

At 4 bits the range of a block is searched: for a few zero points and clippings the scale follows by least
squares, and the pair that leaves the least error wins. Scales are float16 wherever that holds them.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..scratch import spooled
from .layouts import CHUNK_VALUES, BlockValues, QuantizedWeight, kept, pack

BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Ranges tried for a 4-bit block, as fractions of the smallest that holds all its values.
_RANGES = (1.03, 0.97, 0.92, 0.87, 0.81, 0.75)
#: Zero points tried, beside the one of the whole range.
_SHIFTS = (0, -1, 1)
#: Steps whose scales float16 holds to three digits: a scale may be a few times the step of the whole weight.
_LEAST_HALF, _MOST_HALF = float(np.finfo(np.float16).smallest_normal), 2.0**14


def can_quantize(columns: int, block_size: int) -> bool:
    """Whether blocks of `block_size` divide a row of `columns` weights."""
    return columns % block_size == 0


def stored_bytes(rows: int, columns: int, bits: int, block_size: int) -> int:
    """What `quantize` takes for a weight: codes, float16 scales and, at 4 bits, zero points."""
    blocks = columns // block_size
    zero_points = (blocks + 1) // 2 if bits == 4 else 0
    return rows * (columns * bits // 8 + 2 * blocks + zero_points)


def quantize(
    weight: torch.Tensor, bits: int, block_size: int, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`, whose columns `block_size` divides, to the nearest.

    Args:
        weight: the weight.
        bits: 4 or 8.
        block_size: weights that share a scale.
        importance: of the columns, float32 `[columns]`, for the choice of a block's range; None: alike.
    """
    rows, columns = weight.shape
    count = columns // block_size
    step = max(1, CHUNK_VALUES // columns)
    dtype = scale_dtype(weight, bits)
    scales = torch.empty(rows, count, dtype=dtype).numpy()
    zero_points = np.empty((rows, count), np.uint8)
    each = None if importance is None else importance.reshape(1, count, block_size)

    def packed_chunks() -> Iterator[torch.Tensor]:
        for start in range(0, rows, step):
            part = slice(start, start + step)
            blocks = weight[part].float().reshape(-1, count, block_size)
            scale, zero_point = fit_blocks(blocks, bits, dtype, each)
            scales[part], zero_points[part] = scale.numpy(), zero_point.numpy()
            codes = to_codes(blocks, inverse_of(scale)[..., None], zero_point[..., None], bits)
            yield torch.from_numpy(pack(codes.to(torch.uint8).reshape(-1, columns).numpy(), bits))

    packed = spooled((rows, columns * bits // 8), torch.uint8, packed_chunks())
    return QuantizedWeight(
        packed.numpy(),
        BlockValues(kept([scales])),
        bits,
        block_size,
        zero_points=kept([zero_points]) if bits == 4 else None,
    )


def scale_dtype(weight: torch.Tensor, bits: int) -> torch.dtype:
    """float16, unless the weight is so small or so large that its scales would lose digits there."""
    step = float(max(-weight.min(), weight.max())) / (2**bits - 1)
    return torch.float16 if _LEAST_HALF <= step <= _MOST_HALF else torch.float32


def fit_blocks(
    blocks: torch.Tensor, bits: int, dtype: torch.dtype, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, both float32 `[…]`, of blocks float32 `[…, block_size]`.

    Args:
        blocks: the weights.
        bits: 4; or 8, where the zero point is 128 and the largest magnitude has the code 1 or 255.
        dtype: of the scales; they are values that it holds.
        importance: of each weight's error, positive, of a shape that broadcasts to that of `blocks`.
    """
    if bits == 8:
        scale = blocks.abs().amax(-1) / 127
        return scale.to(dtype).float(), torch.full_like(scale, 128)
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    middle = torch.where(high > low, -15 * low / (high - low), 8).round_()
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for shift in _SHIFTS:
        zero_point = (middle + shift).clamp_(0, 15)
        # The smallest scale with which neither end is clipped.
        whole = torch.maximum(
            torch.where(zero_point < 15, high / (15 - zero_point).clamp_min(1), 0),
            torch.where(zero_point > 0, -low / zero_point.clamp_min(1), 0),
        ).clamp_min(torch.finfo(torch.float32).tiny)
        for fraction in _RANGES:
            inverse = 1 / (whole * fraction)
            levels = (blocks * inverse[..., None]).round_()
            levels = torch.minimum(torch.maximum(levels, -zero_point[..., None]), 15 - zero_point[..., None])
            weighted = levels if importance is None else levels * importance
            product, square = (weighted * blocks).sum(-1), (weighted * levels).sum(-1)
            scale = torch.where(square > 0, product / square, 0)
            gain = scale * product  # by how much the squared error is less than with all zeros
            if best is None:
                best = gain, scale, zero_point
            else:
                better = gain > best[0]
                best = (
                    torch.where(better, gain, best[0]),
                    torch.where(better, scale, best[1]),
                    torch.where(better, zero_point, best[2]),
                )
    assert best is not None
    return best[1].to(dtype).float(), best[2]


def inverse_of(scale: torch.Tensor) -> torch.Tensor:
    """What weights are multiplied with on the way to their codes; 0 where the scale is."""
    return torch.where(scale == 0, 0, 1 / scale)


def to_codes(
    weights: torch.Tensor, inverse: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> torch.Tensor:
    """The nearest codes, as floats, of weights in blocks with these inverse scales and zero points."""
    return (weights * inverse).round_().add_(zero_point).clamp_(0, 2**bits - 1)
