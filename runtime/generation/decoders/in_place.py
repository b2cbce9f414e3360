"""The decoder graph over a cache of fixed size: a run writes its keys and values where they stay.

Everything that a token needs is bound once: the cache, the token ids, the logits. Nothing is copied from
token to token and nothing is allocated but what onnxruntime's arena holds already.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.wiring import SEQLENS, TOTAL
from edgepeft.errors import UsageError

from ...key_value_cache import PAST, PRESENT, cache_specs
from ...session import GraphSession
from .base import Array, FloatArray


class InPlaceDecoder:
    """See `Decoder`. Logits are views that the next call overwrites.

    Args:
        session: the decoder graph with bindings of its own, an adapter's inputs among them.
        manifest: the bundle's manifest.
        rows: sequences at once.
        capacity: tokens that a row holds at most.
        chunk: tokens of a prompt that are read at a time.
    """

    def __init__(
        self,
        session: GraphSession,
        manifest: Manifest,
        rows: int,
        capacity: int,
        chunk: int,
    ) -> None:
        self.rows = rows
        self.lengths = [0] * rows
        self._session, self._capacity, self._chunk = session, capacity, chunk
        # Pages that no token has been written to take no memory.
        self._cache = {
            name: np.empty((rows, int(spec.shape[1]), capacity, int(spec.shape[3])), np.dtype(spec.dtype))
            for name, spec in cache_specs(manifest).items()
        }
        self._logits = np.empty((rows, manifest.model.vocab_size), np.float32)
        self._ids = np.empty((rows, 1), np.int64)
        self._last = np.empty(rows, np.int32)
        self._total = np.empty(1, np.int32)
        session.bind({TOTAL: self._total})
        self._rows_bound: slice | None = None
        self._ids_bound: Array | None = None

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`.

        Raises:
            UsageError: the row would be longer than the cache.
        """
        unread = np.array([ids], np.int64)
        while unread.size:
            chunk = np.ascontiguousarray(unread[:, : self._chunk])
            unread = unread[:, self._chunk :]
            self.lengths[row] += chunk.size
            self._run(slice(row, row + 1), chunk)
        logits: FloatArray = self._logits[row]
        return logits

    def step(self, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.step`; a row of length 0 writes where its first token will be."""
        self._ids[:, 0] = ids
        self.lengths = [length + (length > 0) for length in self.lengths]
        self._run(slice(0, self.rows), self._ids)
        return self._logits

    def truncate(self, row: int, length: int) -> None:
        """See `Decoder.truncate`."""
        self.lengths[row] = min(length, self.lengths[row])

    def snapshot(self, row: int) -> dict[str, Array]:
        """See `Decoder.snapshot`."""
        return {name: part[row, :, : self.lengths[row]].copy() for name, part in self._cache.items()}

    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """See `Decoder.restore`."""
        for name, part in self._cache.items():
            kept = state[name]
            self.lengths[row] = kept.shape[1]
            part[row, :, : kept.shape[1]] = kept

    def close(self) -> None:
        """See `Decoder.close`."""
        if self._cache:
            self._session.unbind()
            self._session.drop_mapped_pages()
            self._cache.clear()

    def _run(self, rows: slice, ids: Array) -> None:
        """One run over some rows, their lengths already those after it."""
        last = [max(length, 1) - 1 for length in self.lengths[rows]]
        total = max(last) + 1
        if total > self._capacity:  # the graph would write behind the cache
            raise UsageError(f"a text has {total} tokens, the cache holds {self._capacity}")
        self._last[rows] = last
        self._total[0] = total
        if rows != self._rows_bound:
            self._bind_rows(rows)
            self._rows_bound = rows
        if ids is not self._ids_bound:
            self._session.bind({"input_ids": ids})
            self._ids_bound = ids
        self._session.run()

    def _bind_rows(self, rows: slice) -> None:
        self._session.bind(
            {
                SEQLENS: self._last[rows],
                **{PAST + name: part[rows] for name, part in self._cache.items()},
            }
        )
        presents = {PRESENT + name: part[rows] for name, part in self._cache.items()}
        self._session.bind_outputs({"logits": self._logits[rows], **presents})
