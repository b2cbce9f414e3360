"""The inference graph whose cache grows: a run takes the keys and values so far and gives longer ones.

They stay in onnxruntime's own memory between tokens. Rows have caches of their own and run one after the
other.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from ...key_value_cache import PAST, PRESENT, empty_cache
from ...session import GraphSession
from .base import Array, FloatArray
from .rows import RowByRow


class GrowingDecoder(RowByRow):
    """See `Decoder`.

    Args:
        session: the inference graph with bindings of its own, an adapter's inputs among them.
        rows: sequences at once.
    """

    def __init__(self, session: GraphSession, rows: int) -> None:
        super().__init__(rows)
        self._session = session
        self._presents = [name for name in session.outputs if name.startswith(PRESENT)]
        nothing = empty_cache(session.inputs, 1)
        empty = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in nothing.items()}
        self._empty: dict[str, ort.OrtValue] = empty
        self._caches: list[dict[str, ort.OrtValue]] = [empty] * rows
        self._session.bind_values(empty)
        self._bound = 0

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`; all at once."""
        if self._bound != row:
            self._session.bind_values(self._caches[row])
            self._bound = row
        length = self.lengths[row] + len(ids)
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        self._session.bind({name: value for name, value in feeds.items() if name in self._session.inputs})
        outputs = self._session.run_for(["logits", *self._presents])
        logits: FloatArray = outputs.pop("logits").numpy()[0, -1]
        self._keep(row, {PAST + name.removeprefix(PRESENT): value for name, value in outputs.items()}, length)
        return logits

    def truncate(self, row: int, length: int) -> None:
        """See `Decoder.truncate`."""
        if length == 0:
            self._keep(row, self._empty, 0)
        elif length < self.lengths[row]:
            shorter = {
                name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :length]))
                for name, value in self._caches[row].items()
            }
            self._keep(row, shorter, length)

    def snapshot(self, row: int) -> dict[str, Array]:
        """See `Decoder.snapshot`."""
        return {name.removeprefix(PAST): value.numpy()[0] for name, value in self._caches[row].items()}

    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """See `Decoder.restore`."""
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(state[name.removeprefix(PAST)][None]))
            for name in self._empty
        }
        self._keep(row, values, next(iter(values.values())).shape()[2])

    def close(self) -> None:
        """See `Decoder.close`."""
        self._session.unbind()
        self._caches.clear()

    def _keep(self, row: int, values: dict[str, ort.OrtValue], length: int) -> None:
        self._caches[row], self.lengths[row] = values, length
        if self._bound == row:
            # What is bound stays alive, so the shorter cache must not stay bound.
            self._session.bind_values(values)
