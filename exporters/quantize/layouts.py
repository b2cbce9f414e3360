"""Weights in blocks, as they are stored and as the graphs read them.

    w[n, k] = (q[n, k] - zero_point[n, k // block_size]) * scale[n, k // block_size]
              (+ minimum[n, k // block_size])

with q in 0…15 at 4 bits and in 0…255 at 8; a zero point that is not stored is 8 or 128. With `order`, column
j of all this is column `order[j]` of the weight.
Source: `MatMulNBits` and `GatherBlockQuantized` of com.microsoft, version 1; the minimum is GGML's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..scratch import spooled

#: Weights decoded at a time: a chunk that stays in the cache is ten times faster than a whole embedding.
CHUNK_VALUES = 2**18


@dataclass(frozen=True)
class BlockValues:
    """A number for each block of a weight.

    Attributes:
        values: `[rows, blocks]` float32, float16, uint8 or int8.
        factors: `[rows, blocks / n]` float32 or float16, one for each n blocks that follow each other, to be
            multiplied with `values`; None: 1.
    """

    values: np.ndarray
    factors: np.ndarray | None = None

    def decoded(self, rows: slice = slice(None)) -> np.ndarray:
        """The numbers of some rows, float32 `[rows, blocks]`."""
        values = self.values[rows].astype(np.float32)
        if self.factors is None:
            return values
        factors = self.factors[rows].astype(np.float32)
        return np.asarray(values * factors.repeat(values.shape[1] // factors.shape[1], axis=1))

    def with_rows(self, rows: np.ndarray) -> "BlockValues":
        """Those of some rows, int64 `[rows]`."""
        return BlockValues(self.values[rows], None if self.factors is None else self.factors[rows])

    @property
    def nbytes(self) -> int:
        """What is stored."""
        return self.values.nbytes + (0 if self.factors is None else self.factors.nbytes)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for numbers that can stand one below the other."""
        factors = self.factors
        return self.values.dtype, self.values.shape[1], None if factors is None else factors.shape[1]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[rows, columns]`.

    Attributes:
        packed: uint8 `[rows, columns * bits / 8]`, at 4 bits the even column in the low half of a byte.
        scales: of the blocks.
        bits: 4 or 8.
        block_size: columns that share a scale.
        zero_points: the codes that stand for 0, uint8 `[rows, blocks]`; None: the middle one.
        minimums: what is added to all weights of a block; None: nothing.
        order: int64 `[columns]`, where the columns are that stand in `packed`; None: at their places.
    """

    packed: np.ndarray
    scales: BlockValues
    bits: int
    block_size: int
    zero_points: np.ndarray | None = None
    minimums: BlockValues | None = None
    order: np.ndarray | None = None

    @classmethod
    def of_codes(
        cls,
        codes: np.ndarray,
        scales: BlockValues,
        bits: int,
        block_size: int,
        *,
        zero_points: np.ndarray | None = None,
        minimums: BlockValues | None = None,
        order: np.ndarray | None = None,
    ) -> "QuantizedWeight":
        """Of `codes` uint8 `[rows, columns]`, one code a byte."""
        return cls(pack(codes, bits), scales, bits, block_size, zero_points, minimums, order)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        rows, packed_columns = self.packed.shape
        return rows, packed_columns * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """What is stored, but for an order of the columns."""
        rows, blocks = self.scales.values.shape
        zero_points = 0 if self.zero_points is None else rows * -(-blocks * self.bits // 8)
        minimums = 0 if self.minimums is None else self.minimums.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero_points + minimums

    @property
    def middle(self) -> int:
        """The code that stands for 0 where no zero points are stored."""
        return int(2 ** (self.bits - 1))

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for weights that can stand one below the other."""
        return (
            self.bits,
            self.block_size,
            self.shape[1],
            self.scales.kind,
            self.zero_points is None,
            None if self.minimums is None else self.minimums.kind,
            None if self.order is None else self.order.tobytes(),
        )

    def with_rows(self, rows: np.ndarray) -> "QuantizedWeight":
        """Some of its rows, by their numbers, int64 `[rows]`."""
        return replace(
            self,
            packed=self.packed[rows],
            scales=self.scales.with_rows(rows),
            zero_points=None if self.zero_points is None else self.zero_points[rows],
            minimums=None if self.minimums is None else self.minimums.with_rows(rows),
        )

    def dequantize(self) -> torch.Tensor:
        """float32 `[rows, columns]`, as onnxruntime computes it."""
        rows, columns = self.shape
        step = max(1, CHUNK_VALUES // columns)
        return spooled(
            self.shape, torch.float32, (self._decoded(slice(row, row + step)) for row in range(0, rows, step))
        )

    def _decoded(self, rows: slice) -> torch.Tensor:
        scales = self.scales.decoded(rows)
        codes = unpack(self.packed[rows], self.bits).astype(np.float32)
        blocks = codes.reshape(*scales.shape, self.block_size)
        if self.zero_points is None:
            blocks -= np.float32(self.middle)
        else:
            blocks -= self.zero_points[rows][:, :, None].astype(np.float32)
        blocks *= scales[:, :, None]
        if self.minimums is not None:
            blocks += self.minimums.decoded(rows)[:, :, None]
        weight = blocks.reshape(len(scales), -1)
        if self.order is not None:
            turned = np.empty_like(weight)
            turned[:, self.order] = weight
            weight = turned
        return torch.from_numpy(weight)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[rows, columns]`, one code a byte, as `[rows, columns * bits / 8]`; an odd last one gets a 0."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << 4))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one `kind`, one below the other."""
    first = weights[0]
    zero_points = [weight.zero_points for weight in weights if weight.zero_points is not None]
    minimums = [weight.minimums for weight in weights if weight.minimums is not None]
    return replace(
        first,
        packed=kept([weight.packed for weight in weights]),
        scales=stacked([weight.scales for weight in weights]),
        zero_points=kept(zero_points) if zero_points else None,
        minimums=stacked(minimums) if minimums else None,
    )


def stacked(parts: Sequence[BlockValues]) -> BlockValues:
    """Numbers of one `kind`, one below the other, in scratch files."""
    factors = [part.factors for part in parts if part.factors is not None]
    return BlockValues(kept([part.values for part in parts]), kept(factors) if factors else None)


def kept(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays `[…, columns]` one below the other, in a scratch file."""
    # Of a single row, a part of a mapped file is a view of it, which PyTorch warns of.
    parts = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in arrays]
    return np.asarray(spooled((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype, parts))
