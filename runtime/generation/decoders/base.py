"""What generation asks of a language model, however it is run."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]


class Decoder(Protocol):
    """A language model that reads tokens into its key/value cache and says what comes next.

    A row that has ended is truncated to length 0 after every step: a decoder may leave it out of the next
    one, and what `step` says of it means nothing.

    Attributes:
        rows: sequences at once.
        lengths: tokens in the cache, by row.
    """

    @property
    def rows(self) -> int: ...

    @property
    def lengths(self) -> Sequence[int]: ...

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """Add tokens to one row, in chunks of the decoder's choosing; the logits after the last, float32
        `[vocab]`."""
        ...

    def step(self, ids: Sequence[int]) -> FloatArray:
        """Add one token to every row; the logits after it, float32 `[rows, vocab]`."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget what came after the row's first `length` tokens."""
        ...

    def snapshot(self, row: int) -> dict[str, Array]:
        """Copies of the row's keys and values by name, `[kv_heads, length, head_dim]` each.

        Raises:
            UsageError: the model has no key/value cache.
        """
        ...

    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """Begin a row with what `snapshot` gave; each part is asked for once.

        Raises:
            UsageError: the model has no key/value cache.
        """
        ...

    def close(self) -> None:
        """Free the cache; the decoder cannot be used afterwards."""
        ...
