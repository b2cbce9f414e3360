"""The key/value cache of a streamed model: memory of a fixed size, taken before the first token."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Manifest, TensorSpec
from edgepeft.bundle.wiring import StreamedInference

Array = npt.NDArray[np.generic]

PAST, PRESENT = "past_key_values.", "present."


def cache_specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """The parts of the cache, `[batch, kv_heads, past_sequence, head_dim]` each, by name without prefix; none
    for a model without a cache."""
    return {
        spec.name.removeprefix(PAST): spec
        for spec in manifest.graphs["inference"].inputs
        if spec.name.startswith(PAST)
    }


def empty_cache(inputs: Mapping[str, TensorSpec], batch: int) -> dict[str, Array]:
    """A graph's cache inputs at length 0, `[batch, kv_heads, 0, head_dim]` each; none for a model without a
    cache."""
    return {
        name: np.zeros(_shape(spec, batch, 0), spec.dtype)
        for name, spec in inputs.items()
        if name.startswith(PAST)
    }


def growing_cache_bytes(manifest: Manifest, rows: int, tokens: int) -> int:
    """What keys and values of so many rows and tokens take where there is no room beside them."""
    return sum(_nbytes(spec, rows, tokens) for spec in cache_specs(manifest).values())


def cache_bytes(manifest: Manifest, streamed: StreamedInference, rows: int, tokens: int) -> int:
    """What a `KeyValueCache` for so many rows and tokens takes."""
    specs = cache_specs(manifest)
    slots = len(specs) + _spare(streamed)
    return slots * max((_nbytes(spec, rows, tokens) for spec in specs.values()), default=0)


class KeyValueCache:
    """Keys and values of what a model has read.

    A graph cannot write where it reads, so there are a few slots more than parts: a stage writes its longer
    parts into free slots, and the slots of the shorter ones are free afterwards. No run allocates any of it.

    Args:
        manifest: of a bundle with streamed inference.
        streamed: its wiring.
        rows: rows of the batch.
        tokens: the most tokens that it can hold a row.
    """

    def __init__(self, manifest: Manifest, streamed: StreamedInference, rows: int, tokens: int) -> None:
        self._specs = cache_specs(manifest)
        self._rows = rows
        self.length = 0
        slot_bytes = max((_nbytes(spec, rows, tokens) for spec in self._specs.values()), default=0)
        slots = [np.empty(slot_bytes, np.uint8) for _ in range(len(self._specs) + _spare(streamed))]
        self._held = dict(zip(self._specs, slots, strict=False))
        self._free = slots[len(self._specs) :]
        self._written: dict[str, npt.NDArray[np.uint8]] = {}

    def past(self) -> dict[str, Array]:
        """What the graphs take, by input name."""
        return {PAST + name: self._view(name, slot, self.length) for name, slot in self._held.items()}

    def room(self, names: Iterable[str], tokens: int) -> dict[str, Array]:
        """Where a stage writes these parts, so many tokens longer than they are, by name."""
        self._written = {name: self._free.pop() for name in names}
        return {name: self._view(name, slot, self.length + tokens) for name, slot in self._written.items()}

    def keep(self) -> None:
        """Take what the stage has written in the place of what it has read."""
        self._free += [self._held[name] for name in self._written]
        self._held |= self._written

    def truncate(self, length: int) -> None:
        """Forget what came after the first `length` tokens."""
        for name, slot in self._held.items():
            kept = self._view(name, slot, self.length)[:, :, :length].copy()
            self._view(name, slot, length)[:] = kept
        self.length = length

    def snapshot(self) -> dict[str, Array]:
        """Copies of the first row's parts, `[kv_heads, length, head_dim]` each."""
        return {name: self._view(name, slot, self.length)[0].copy() for name, slot in self._held.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Hold what the only row's `snapshot` gave."""
        for name, slot in self._held.items():
            part = state[name]
            self.length = part.shape[1]
            self._view(name, slot, self.length)[0] = part

    def _view(self, name: str, slot: npt.NDArray[np.uint8], length: int) -> Array:
        spec = self._specs[name]
        shape = _shape(spec, self._rows, length)
        return slot[: _nbytes(spec, self._rows, length)].view(spec.dtype).reshape(shape)


def _spare(streamed: StreamedInference) -> int:
    return max(len(stage.cache) for stage in streamed.stages)


def _shape(spec: TensorSpec, rows: int, length: int) -> tuple[int, int, int, int]:
    return rows, int(spec.shape[1]), length, int(spec.shape[3])


def _nbytes(spec: TensorSpec, rows: int, length: int) -> int:
    return np.dtype(spec.dtype).itemsize * math.prod(_shape(spec, rows, length))
