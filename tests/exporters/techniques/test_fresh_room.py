"""A fresh adapter asks for its memory before it takes it."""

from pathlib import Path

import pytest

from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.adapters.graph_inputs import prepare
from edgepeft.runtime.training import starting

from .. import sharing
from . import parity


@pytest.mark.parametrize("method", ["vera", "lora", "lokr", "prefix_tuning"])
def test_a_fresh_adapter_asks_for_what_it_takes(
    method: str, shared: sharing.Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors, and what the graphs take that no file has, such as VeRA's pair of matrices."""
    root: Path = shared(f"parity/{method}/llama/32", lambda folder: parity.write(method, "llama", 32, folder))
    asked: list[int] = []
    monkeypatch.setattr(starting, "check_room", lambda nbytes, _: asked.append(nbytes))
    bundle = open_bundle(root / "b")
    fresh = starting.fresh_adapter(bundle, 8, 0, method)
    taken = {id(array): array.nbytes for array in prepare(bundle, fresh).inputs.values()}
    assert asked[0] >= sum(taken.values()) + 4 * fresh.parameters
