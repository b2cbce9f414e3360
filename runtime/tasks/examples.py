"""What records become: rows of tokens, or values, and labels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Outputs = Mapping[str, npt.NDArray[np.float32]]


Label = int | tuple[float, ...] | None
"""A class; or a number for every output of a regression or of classes that do not exclude each other."""


class NothingToLearnError(Exception):
    """Nothing of a record counts in the loss: an update leaves it out; a `DataError` where that cannot be."""


@dataclass(frozen=True)
class Row:
    """One row of tokens: int32, with token types and, for language models and token classifiers, labels.

    `words` holds the position of the first token of each word, where the record came in words; `spans` int32
    `[tokens, 2]` the characters of `text` that each token is, (0, 0) for special tokens, where they matter.
    """

    input_ids: npt.NDArray[np.int32]
    type_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32] | None = None
    words: npt.NDArray[np.int32] | None = None
    spans: npt.NDArray[np.int32] | None = None
    text: str = ""

    @property
    def arrays(self) -> tuple[npt.NDArray[np.int32] | None, ...]:
        """All that the row holds."""
        return (self.input_ids, self.type_ids, self.labels)


@dataclass(frozen=True)
class Example:
    """One encoded record: rows of tokens (two for a pair of sentences) or float32 values (pixels `[channels,
    height, width]`, samples `[samples]`), and its label, where it has one."""

    rows: tuple[Row, ...] = ()
    label: Label = None
    truncated: bool = False
    values: npt.NDArray[np.float32] | None = None

    @property
    def length(self) -> int:
        """Tokens (or labels) of the longest row, or samples; 1 for an image."""
        if self.values is not None:
            return len(self.values) if self.values.ndim == 1 else 1
        return max(len(array) for row in self.rows for array in row.arrays if array is not None)

    @property
    def arrays(self) -> list[Array | None]:
        """All arrays that the example holds."""
        return [self.values, *(array for row in self.rows for array in row.arrays)]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays if array is not None)

    @property
    def held_bytes(self) -> int:
        """What the example takes, about: its arrays, and a kibibyte of objects."""
        return self.nbytes + 2**10


def shown(value: object) -> str:
    """A value for messages, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
