"""Weights of 4 bits whose codes stand for the values of a table, as bitsandbytes stores them.

    w[i] = table[code[i]] * absmax[i // block_size]

with i over the weights of all rows, one row behind the other.
Source: `MatMulBnb4` of com.microsoft, version 1, and bitsandbytes' `quantize_4bit`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from edgepeft.errors import ExportError

from ..scratch import spooled
from .layouts import CHUNK_VALUES, QuantizedWeight

#: `quant_type` of the operator, by bitsandbytes' names.
FP4, NF4 = 0, 1
_FP4_VALUES = (0, 0.00520833333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25)
#: The values of the codes 0…15, float32, by `quant_type`.
TABLES = {
    FP4: np.array([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], np.float32),
    # Quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E).
    NF4: np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
}


@dataclass(frozen=True)
class TableWeight:
    """A weight `[rows, columns]`.

    Attributes:
        packed: uint8 `[rows * columns / 2]`, the first of two codes in the high half of a byte.
        absmax: float32 `[rows * columns / block_size]`, the largest magnitude of each block.
        shape: rows and columns.
        block_size: weights that share an `absmax`, which follow each other across the ends of rows.
        quant_type: `FP4` or `NF4`.
    """

    bits: ClassVar[int] = 4
    packed: np.ndarray
    absmax: np.ndarray
    shape: tuple[int, int]
    block_size: int
    quant_type: int

    @property
    def nbytes(self) -> int:
        """What is stored."""
        return self.packed.nbytes + self.absmax.nbytes

    def with_rows(self, rows: np.ndarray) -> "TableWeight":
        """Some of its rows, by their numbers, int64 `[rows]`.

        Raises:
            ExportError: blocks reach from one row into the next.
        """
        before, columns = self.shape
        if columns % self.block_size:
            raise ExportError(
                f"rows of {columns} weights share scales in blocks of {self.block_size}, so none can be "
                "taken alone: trim the vocabulary of the float model (--keep-vocabulary)"
            )
        return replace(
            self,
            packed=self.packed.reshape(before, -1)[rows].reshape(-1),
            absmax=self.absmax.reshape(before, -1)[rows].reshape(-1),
            shape=(len(rows), columns),
        )

    def dequantize(self) -> torch.Tensor:
        """float32 `[rows, columns]`, as onnxruntime computes it."""
        table = TABLES[self.quant_type]
        # Both values of a byte are looked up at once.
        pairs = np.stack([table.repeat(16), np.tile(table, 16)], axis=1)
        step = max(1, CHUNK_VALUES // self.block_size)

        def decoded(first: int) -> torch.Tensor:
            absmax = self.absmax[first : first + step]
            codes = self.packed[first * self.block_size // 2 : (first + len(absmax)) * self.block_size // 2]
            blocks = pairs[codes].reshape(len(absmax), self.block_size)
            return torch.from_numpy(blocks * absmax[:, None])

        return spooled(self.shape, torch.float32, map(decoded, range(0, len(self.absmax), step)))


#: A weight whose codes are kept.
StoredWeight = QuantizedWeight | TableWeight
