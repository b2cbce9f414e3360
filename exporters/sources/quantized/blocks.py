"""From the groups of a checkpoint to blocks that onnxruntime multiplies by, with the same codes.

`MatMulNBits` takes blocks of 16, 32, 64, 128 or 256 columns. A group of another size is several blocks with
the same scale.
"""

import numpy as np

from ...quantize.blockwise import BLOCK_SIZES
from ...quantize.layouts import BlockValues, QuantizedWeight, kept, pack, unpack

#: Of groups larger than all blocks: the size with the fastest kernel.
_LARGE = 128


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 `[rows, n * 32 / bits]` of int32 or uint32 `[rows, n]`, the first in the lowest bits."""
    parts = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return parts
    return np.stack([parts & 15, parts >> 4], axis=-1).reshape(len(parts), -1)


def equal_groups(columns: int, size: int) -> np.ndarray:
    """The group of each column, int64 `[columns]`, where `size` columns that follow each other are one."""
    return np.arange(columns) // size


def block_size_of(groups: np.ndarray) -> int | None:
    """Columns of the largest blocks that lie in one group each; None where that is less than the smallest.

    Args:
        groups: the group of each column, int64 `[columns]`, sorted.
    """
    size = int(np.gcd.reduce(np.unique(groups, return_counts=True)[1]))
    power = size & -size
    if power < min(BLOCK_SIZES):
        return None
    return power if power in BLOCK_SIZES else _LARGE


def in_blocks(
    packed: np.ndarray,
    bits: int,
    groups: np.ndarray,
    block_size: int,
    scales: np.ndarray,
    *,
    zero_points: np.ndarray | None = None,
    biases: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> QuantizedWeight:
    """A weight whose codes stay as they are, in scratch files.

    Args:
        packed: as in `QuantizedWeight`, with the columns at their places.
        bits: 4 or 8.
        groups: the group of each column, sorted.
        block_size: see `block_size_of`.
        scales: float16 or float32 `[rows, groups]`.
        zero_points: the codes that stand for 0, uint8 `[rows, groups]`; where all are the middle one, none
            are stored. None: the middle one.
        biases: float16 or float32 `[rows, groups]`, added to codes times scales. The code in the middle then
            stands for a value that is computed in float32, for which the operator is fastest.
        order: the order that sorts the columns by group, as in `QuantizedWeight`; None: they are sorted.
    """
    if order is not None:
        packed = pack(unpack(packed, bits)[:, order], bits)
    group = groups[::block_size]
    middle = 2 ** (bits - 1)
    if zero_points is not None and (zero_points == middle).all():
        zero_points = None
    minimums = None
    if biases is not None:
        minimums = biases.astype(np.float32) + middle * scales.astype(np.float32)
    return QuantizedWeight(
        kept([packed]),
        BlockValues(kept([scales[:, group]])),
        bits,
        block_size,
        None if zero_points is None else kept([zero_points[:, group]]),
        None if minimums is None else BlockValues(kept([minimums[:, group]])),
        order,
    )


def signed_codes(values: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 of integers int8 that lie around 0."""
    return np.asarray((values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8))


def packed_signed(values: np.ndarray, bits: int) -> np.ndarray:
    """int8 `[rows, columns]`, in -8…7 at 4 bits, as `QuantizedWeight` has codes."""
    return pack(signed_codes(values, bits), bits)
