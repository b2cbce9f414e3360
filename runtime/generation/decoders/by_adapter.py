"""Rows that have adapters of their own: those of one adapter run together, one adapter after the other."""

from collections.abc import Mapping, Sequence

import numpy as np

from .base import Array, Decoder, FloatArray


class ByAdapter:
    """See `Decoder`. Every adapter stays bound where it is, so a token binds nothing anew; logits are
    overwritten by the next step.

    Args:
        parts: a decoder for each adapter, over bindings of its own, and the rows that are its rows, in their
            order; every row is in one of them.
    """

    def __init__(self, parts: Sequence[tuple[Decoder, Sequence[int]]]) -> None:
        self._parts = parts
        self._places = {row: (part, index) for part, rows in parts for index, row in enumerate(rows)}
        self._logits: FloatArray | None = None

    @property
    def rows(self) -> int:
        """See `Decoder`."""
        return len(self._places)

    @property
    def lengths(self) -> list[int]:
        """See `Decoder`."""
        places = (self._places[row] for row in range(self.rows))
        return [part.lengths[index] for part, index in places]

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`."""
        part, index = self._places[row]
        return part.read(index, ids)

    def step(self, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.step`; an adapter whose rows have all ended is not run."""
        for part, rows in self._parts:
            if any(part.lengths):
                logits = part.step([ids[row] for row in rows])
                if self._logits is None:
                    self._logits = np.zeros((self.rows, logits.shape[1]), np.float32)
                self._logits[rows] = logits
        assert self._logits is not None, "every row has ended"
        return self._logits

    def truncate(self, row: int, length: int) -> None:
        """See `Decoder.truncate`."""
        part, index = self._places[row]
        part.truncate(index, length)

    def snapshot(self, row: int) -> dict[str, Array]:
        """See `Decoder.snapshot`."""
        part, index = self._places[row]
        return part.snapshot(index)

    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """See `Decoder.restore`."""
        part, index = self._places[row]
        part.restore(index, state)

    def close(self) -> None:
        """See `Decoder.close`."""
        for part, _ in self._parts:
            part.close()
