"""Bundles of format 1, which edgepeft wrote before slots were of any technique: they open and do the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.adapters import write_adapter
from edgepeft.bundle.adapter_store import add_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.bundle.serialization import manifest_from_json
from edgepeft.errors import BundleError

from ..runtime import tiny
from .test_manifest import put

#: What `tiny.write_bundle` wrote then, without `files`.
WRITTEN = Path(__file__).parent / "format1.json"


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[Path, Path]:
    """One bundle of today's format and one of format 1."""
    new, old = (tiny.write_bundle(tmp_path / name) for name in ("new", "old"))
    files = json.loads((old / "manifest.json").read_text())["files"]
    (old / "manifest.json").write_text(json.dumps(json.loads(WRITTEN.read_text()) | {"files": files}))
    return new, old


def test_its_slots_are_those_of_today(bundles: tuple[Path, Path]) -> None:
    new, old = (open_bundle(path).manifest for path in bundles)
    assert old == new


def test_it_predicts_and_trains_with_equal_numbers(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """Logits, and every byte of the adapter that an update makes."""
    logits, trained = [], []
    batch = {"input_ids": np.array([[1, 2, 3], [4, 5, 6]])}
    for index, path in enumerate(bundles):
        with edgepeft.load(path) as model:
            logits.append(model.forward(batch, adapter="mine")["logits"])
            output = tmp_path / f"adapted-{index}"
            model.adapt(tiny.records(), output, steps=5, seq_len=8)
        trained.append((output / "adapter_model.safetensors").read_bytes())
    np.testing.assert_array_equal(*logits)
    assert trained[0] == trained[1]


def test_an_adapter_that_is_added_makes_it_one_of_today(bundles: tuple[Path, Path]) -> None:
    new, old = bundles
    adapter = tiny.adapter(trained=True)
    add_adapter(open_bundle(old), "more", adapter, lambda folder: write_adapter(adapter, folder))
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert open_bundle(old).manifest.slots == open_bundle(new).manifest.slots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("lora_slots", value=KeyError), "lacks the field 'lora_slots'"),
        (put("slots", value=[]), "unknown field 'slots'"),
        (
            put("lora_slots", 0, "in_features", value="8"),
            r"lora_slots\[0\]\.in_features is '8', expected int",
        ),
        (put("lora_slots", 0, "in_features", value=0), "0 -> 8"),
        (put("lora_slots", 0, "a_input", value="nothing"), "no input 'nothing'"),
        (put("lora_slots", 0, "a_input", value=tiny.B), "belongs to two slots"),
        (put("lora_slots", 0, "activation_axes", value=1), "activation_axes is 1"),
        (put("saved_modules", 0, "default", value="dense"), "its default is"),
        (put("saved_modules", 0, "shape", value=["size", 8]), "expected int"),
        (put("format_version", value=2), "has an unknown field 'lora_slots'"),
    ],
)
def test_it_is_read_as_strictly(
    bundles: tuple[Path, Path], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = json.loads((bundles[1] / "manifest.json").read_text())
    change(data)
    with pytest.raises(BundleError, match=message):
        manifest_from_json(json.dumps(data))


def test_whatever_stands_in_a_place_the_answer_is_a_bundle_error(bundles: tuple[Path, Path]) -> None:
    data = json.loads((bundles[1] / "manifest.json").read_text())
    for name in ("lora_slots", "saved_modules"):
        for place in ((name,), (name, 0), *((name, 0, key) for key in data[name][0])):
            for value in (None, -1, "x", [], {}, [[]], 1e300, True):
                changed = json.loads(json.dumps(data))
                put(*place, value=value)(changed)
                try:
                    manifest_from_json(json.dumps(changed))
                except BundleError:
                    continue
