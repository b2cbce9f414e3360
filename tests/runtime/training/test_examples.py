"""Records of an update, encoded: in memory or in a file, they are the same."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import DataError, EdgePeftError
from edgepeft.runtime.memory.process import PeakMemory, read_memory, release_freed_memory
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import Example, Task, task_for
from edgepeft.runtime.training import examples as module
from edgepeft.runtime.training.examples import Examples

from .. import tiny
from ..test_records import picture_task, recording_task


def read(task: Task, source: Any, folder: Path, max_length: int = 16) -> Examples:
    return Examples(task, records(source), max_length, folder)


def content(example: Example) -> tuple[Any, ...]:
    arrays = [None if values is None else (values.dtype.str, values.tolist()) for values in example.arrays]
    return arrays, example.label, example.truncated, example.length


def test_they_are_what_the_task_makes_of_them(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they take much memory or little: one by one, in slices and in parts."""
    task = task_for(open_bundle(classifier))
    source = tiny.records(50)
    want = [content(item) for item in task.encode_all(records(source), 5, training=True)]
    held = read(task, source, tmp_path, 5)
    monkeypatch.setattr(module, "HELD_BYTES", 20 * 2**10)
    in_file = read(task, iter(source), tmp_path, 5)
    assert (held._file is None, in_file._file is None) == (True, False)
    for found in (held, in_file):
        assert len(found) == 50
        assert [content(item) for item in found] == want
        assert [content(item) for item in found[40:]] == want[40:]
        part = found.part(np.array([7, 3, 49]))
        assert [content(item) for item in part] == [want[7], want[3], want[49]]
        assert [content(item) for item in part[1:]] == [want[3], want[49]]
        assert (found.longest, found.truncated) == (5, sum(item[2] for item in want))
    assert held.digest == in_file.digest
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("field", ["image", "pixel_values", "audio", "input_values"])
def test_values_come_back(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Those that a file of the user's holds as they are, are not written again."""
    task = picture_task(classifier) if field in ("image", "pixel_values") else recording_task(classifier)
    shape = {"image": (2, 2, 3), "pixel_values": (3, 2, 2)}.get(field, (20,))
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    for number, path in enumerate(paths):
        values = np.random.default_rng(number).random(shape, np.float32)
        np.save(path, (values * 255).astype(np.uint8) if field == "image" else values)
    source = [{field: str(path), "label": 0} for path in paths]
    want = [content(item) for item in task.encode_all(records(source), 16, training=True)]
    written: list[bytes] = []
    dumps = pickle.dumps

    def counted(*given: Any, **options: Any) -> bytes:
        written.append(dumps(*given, **options))
        return written[-1]

    monkeypatch.setattr(module.pickle, "dumps", counted)
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    found = read(task, source, tmp_path)
    assert [content(item) for item in found] == want
    assert len(written) == 4
    assert all((b".npy" in data) == field.endswith("_values") for data in written)


def test_many_records_take_no_memory(classifier: Path, tmp_path: Path) -> None:
    """Of 30,000 an index; held, they would take about 20 MB."""
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for record in tiny.records(1000) * 30:
            file.write(json.dumps(record) + "\n")
    task = task_for(open_bundle(classifier))
    read(task, tiny.records(2000), tmp_path)
    release_freed_memory()
    before_bytes = read_memory().resident_bytes
    peak = PeakMemory()
    found = read(task, data, tmp_path)
    assert len(found) == 30_000
    assert peak.nbytes - before_bytes < 4 * 2**20


def test_an_update_is_the_same_with_its_examples_in_a_file(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; of a generator, which is read once."""

    def source() -> Iterator[dict[str, object]]:
        yield from tiny.records()

    options: dict[str, Any] = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2}
    with edgepeft.load(classifier) as model:
        model.adapt(source(), tmp_path / "held", **options)
        monkeypatch.setattr(module, "HELD_BYTES", 0)
        report = model.adapt(source(), tmp_path / "file", **options)
    assert report.records["train"] == 36
    name = "adapter_model.safetensors"
    assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "held"]


def test_a_record_with_nothing_to_learn_is_left_out(language_model: Path, tmp_path: Path) -> None:
    """And counted, and the first of them named; all of them are too many."""
    empty = {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}
    source = [*tiny.sentences(12), empty, {"input_ids": [7]}, *tiny.sentences(12)]
    with edgepeft.load(language_model) as model:
        report = model.adapt(source, tmp_path / "out", steps=2, batch_size=4, learning_rate=1e-3)
        assert report.records == {"train": 22, "held_out": 2, "truncated": 0, "left_out": 2, "remembered": 0}
        assert report.first_left_out == "record 13: no token behind the first is to be learned"
        with pytest.raises(DataError, match=r"record 1: .*: none of the 3 records has anything to learn"):
            model.adapt([empty] * 3, tmp_path / "out")


def test_a_disk_that_is_full(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what was to be kept, and where."""

    def full(**given: Path) -> None:
        raise OSError(28, f"No space left on {given['dir']}")

    monkeypatch.setattr(module, "HELD_BYTES", 0)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    with pytest.raises(EdgePeftError, match=rf"records cannot be kept there .No space left on {tmp_path}"):
        read(task_for(open_bundle(classifier)), tiny.records(), tmp_path)
