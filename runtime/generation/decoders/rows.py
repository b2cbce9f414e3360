"""What decoders have in common that run their rows one after the other."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from .base import Array, FloatArray


class RowByRow(ABC):
    """A `Decoder` whose every row has a cache of its own: a step reads one token into each.

    Args:
        rows: sequences at once.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.lengths = [0] * rows

    def step(self, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.step`; rows of length 0 are left out."""
        read = {row: self.read(row, [ids[row]]) for row in range(self.rows) if self.lengths[row]}
        nothing = np.zeros_like(next(iter(read.values())))
        return np.stack([read.get(row, nothing) for row in range(self.rows)])

    @abstractmethod
    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`."""

    @abstractmethod
    def truncate(self, row: int, length: int) -> None:
        """See `Decoder.truncate`."""

    @abstractmethod
    def snapshot(self, row: int) -> dict[str, Array]:
        """See `Decoder.snapshot`."""

    @abstractmethod
    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """See `Decoder.restore`."""

    @abstractmethod
    def close(self) -> None:
        """See `Decoder.close`."""
