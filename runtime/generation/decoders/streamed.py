"""A model whose weights are streamed: caches of a fixed size, the prompt in chunks that its plan has room
for."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgepeft.bundle.manifest import Manifest

from ...key_value_cache import KeyValueCache
from ...streamed_model import StreamedModel
from .base import Array, FloatArray
from .rows import RowByRow


class StreamedDecoder(RowByRow):
    """See `Decoder`.

    Args:
        model: with bindings of its own, an adapter's inputs among them.
        manifest: of a model with a key/value cache.
        capacities: tokens that each row's cache holds at most.
        chunk: tokens that are read at a time.
    """

    def __init__(
        self, model: StreamedModel, manifest: Manifest, capacities: Sequence[int], chunk: int
    ) -> None:
        super().__init__(len(capacities))
        self._model, self._chunk = model, chunk
        self._inputs = {spec.name for spec in manifest.graphs["inference"].inputs}
        self._caches: list[KeyValueCache | None] = [model.new_cache(1, tokens) for tokens in capacities]

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`; the plan's chunk at a time."""
        cache = self._cache(row)
        unread = list(ids)
        while len(unread) > self._chunk:
            self._model.read(self._batch(cache, unread[: self._chunk]), cache)
            unread = unread[self._chunk :]
        logits: FloatArray = self._model.next_logits(self._batch(cache, unread), cache)[0]
        self.lengths[row] = cache.length
        return logits

    def truncate(self, row: int, length: int) -> None:
        """See `Decoder.truncate`; a row without tokens gives its cache back and is not read again."""
        if length == 0:
            self._caches[row] = None
        else:
            self._cache(row).truncate(length)
        self.lengths[row] = min(length, self.lengths[row])

    def snapshot(self, row: int) -> dict[str, Array]:
        """See `Decoder.snapshot`."""
        return self._cache(row).snapshot()

    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """See `Decoder.restore`."""
        cache = self._cache(row)
        cache.restore(state)
        self.lengths[row] = cache.length

    def close(self) -> None:
        """See `Decoder.close`."""
        self._caches = [None] * self.rows

    def _cache(self, row: int) -> KeyValueCache:
        cache = self._caches[row]
        assert cache is not None, "the row has ended"
        return cache

    def _batch(self, cache: KeyValueCache, ids: list[int]) -> dict[str, Array]:
        mask = np.ones((1, cache.length + len(ids)), np.int64)
        feeds: dict[str, Array] = {"input_ids": np.array([ids], np.int64), "attention_mask": mask}
        return {name: value for name, value in feeds.items() if name in self._inputs}
