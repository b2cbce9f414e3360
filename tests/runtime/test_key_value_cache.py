"""The key/value cache of streamed inference: what was kept is what is read, in memory of a fixed size."""

import numpy as np
import pytest

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.reader import open_bundle
from edgepeft.bundle.wiring import Stage, StreamedInference
from edgepeft.runtime.key_value_cache import KeyValueCache, cache_bytes

STREAMED = StreamedInference(
    None,
    {},
    (
        Stage(
            "a", None, None, {}, {}, {}, cache={"present.0": "present.0.key", "present.1": "present.0.value"}
        ),
    ),
    None,
    MemoryFormula(0, ()),
)


@pytest.fixture
def manifest(language_model) -> Manifest:  # type: ignore[no-untyped-def]
    """A language model with one layer."""
    return open_bundle(language_model).manifest


def test_what_was_kept_is_read_back(manifest: Manifest) -> None:
    """Appended to as a graph appends: it writes the old part and the new one where it is told to."""
    cache = KeyValueCache(manifest, STREAMED, rows=2, tokens=9)
    rng = np.random.default_rng(0)
    expected = {name: value.copy() for name, value in cache.past().items()}
    assert all(value.shape == (2, 1, 0, 8) for value in expected.values())
    for added in (4, 1, 3, 1):
        room = cache.room(["0.key", "0.value"], added)
        for name, place in room.items():
            past = f"past_key_values.{name}"
            new = rng.standard_normal((2, 1, added, 8)).astype(np.float32)
            expected[past] = np.concatenate([expected[past], new], axis=2)
            assert not np.shares_memory(place, cache.past()[past])
            place[...] = expected[past]
        cache.keep()
        cache.length += added
        for name, value in cache.past().items():
            np.testing.assert_array_equal(value, expected[name])


def test_its_size_is_known_beforehand(manifest: Manifest) -> None:
    """Two parts and as many slots to write to."""
    assert cache_bytes(manifest, STREAMED, rows=2, tokens=9) == 4 * (2 * 9 * 8 * 4)
