"""What comes in is inside the budget: read in a way that fits it, or refused before the memory is taken."""

import contextlib
import json
import mmap
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.adapters import CONFIG_FILE, TENSOR_FILE, load_adapter, save_adapter
from edgepeft.bundle.manifest import AudioPreprocessing
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, BudgetError, DataError
from edgepeft.runtime import open_sessions as sessions
from edgepeft.runtime.generation.prompt_cache import open_prompt_cache
from edgepeft.runtime.memory.process import PeakMemory, read_memory, release_freed_memory
from edgepeft.runtime.memory.room import check_room, within
from edgepeft.runtime.preprocessing.audio import read_audio
from edgepeft.runtime.preprocessing.images import read_image
from edgepeft.runtime.records import Record, records
from edgepeft.runtime.tasks.values import read_values

from .. import tiny

MIB = 2**20


@contextlib.contextmanager
def room(mebibytes: int) -> Iterator[None]:
    """A budget that leaves so much, and that the process keeps."""
    release_freed_memory()
    before_bytes = read_memory().resident_bytes
    peak = PeakMemory()
    with within(before_bytes + mebibytes * MIB):
        yield
    assert peak.nbytes <= before_bytes + mebibytes * MIB


def test_a_long_line(tmp_path: Path) -> None:
    """Is read where there is room, and refused with what it takes where there is none."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "ä" * 2**21 + '"}\n{"text": "b"}\n', encoding="utf-8")
    assert [len(record.fields["text"]) for record in records(path)] == [1, 2**21, 1]
    with room(60):
        assert [len(record.fields["text"]) for record in records(path)] == [1, 2**21, 1]
    with room(20), pytest.raises(BudgetError, match=r"data\.jsonl:2: a record of 4\.0 MiB takes 40\.0 MiB"):
        list(records(path))
    path.write_bytes(b'{"text": "' + b"x" * 2**24)
    with room(20), pytest.raises(DataError, match=r"data\.jsonl:1: the line is longer than"):
        list(records(path))


def photograph(path: Path, **options: Any) -> np.ndarray:
    """12 megapixels, as a file."""
    from PIL import Image

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    with small.resize((4000, 3000), Image.Resampling.BICUBIC) as image:
        image.save(path, **options)
    return read_image(path, 3)


def test_a_jpeg_of_12_megapixels_is_decoded_smaller(tmp_path: Path) -> None:
    """Where there is no room for it, and nearly as it is."""
    whole = photograph(tmp_path / "x.jpg", quality=95)
    assert whole.shape == (3000, 4000, 3)
    middle = whole[: 375 * 8, : 500 * 8].reshape(375, 8, 500, 8, 3).mean(axis=(1, 3))
    del whole
    with room(16):
        found = read_image(tmp_path / "x.jpg", 3, 150)
    assert found.shape == (375, 500, 3)
    assert np.abs(found - middle).mean() < 2
    with within(2**40):
        assert read_image(tmp_path / "x.jpg", 3, 150).shape == (3000, 4000, 3)
    with room(16), pytest.raises(BudgetError, match="an image of 3000 x 4000 pixels, takes 80"):
        read_image(tmp_path / "x.jpg", 3)  # all of its pixels are wanted


@pytest.mark.parametrize(
    ("name", "options"), [("x.png", {"compress_level": 1}), ("x.jpg", {"progressive": True})]
)
def test_an_image_that_is_decoded_whole_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """By its header; where there is room, what was asked for is enough."""
    wanted = photograph(tmp_path / name, **options).sum()
    with room(16), pytest.raises(BudgetError, match=r"an image of .* takes .* of memory"):
        read_image(tmp_path / name, 3, 150)
    with room(180):
        assert read_image(tmp_path / name, 3, 150).sum() == wanted


def test_an_array_of_pixels(tmp_path: Path) -> None:
    """A .npy file, as an image and as values."""
    np.save(tmp_path / "x.npy", np.zeros((3000, 4000, 3), np.uint8))
    np.save(tmp_path / "y.npy", np.zeros((3, 2000, 2000), np.float64))
    with room(16), pytest.raises(BudgetError, match="an image of 3000 x 4000 pixels takes 34"):
        read_image(tmp_path / "x.npy", 3)
    record = Record("record 1", {"pixel_values": "y.npy"}, tmp_path)
    with room(16), pytest.raises(BudgetError, match=r"record 1: pixel_values of shape \[3, 2000, 2000\]"):
        read_values(record, "pixel_values", [3, None, None])


def test_a_recording_of_an_hour(tmp_path: Path) -> None:
    """Only what is wanted is read, of either file; of a file of very many channels that is too much."""
    sound = np.random.default_rng(0).integers(-(2**15), 2**15, 3600 * 16_000, np.int16)
    for name, channels in (("x.wav", 1), ("wide.wav", 1000)):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((channels, 2, 16_000, 0, "NONE", ""))
            file.writeframes(sound.data)
    np.save(tmp_path / "x.npy", (sound / np.float32(2**15)).astype(np.float32))
    want = sound[:160_000] / np.float32(2**15)
    del sound
    settings = AudioPreprocessing(16_000, normalize=False)
    with room(6):
        np.testing.assert_array_equal(read_audio(tmp_path / "x.wav", settings, 160_000), want)
    record = Record("record 1", {"input_values": "x.npy"}, tmp_path)
    with room(6):
        np.testing.assert_array_equal(read_values(record, "input_values", [None], 160_000), want)
    with room(16), pytest.raises(BudgetError, match=r"wide\.wav, 57,600 samples of 1000 channels, takes 769"):
        read_audio(tmp_path / "wide.wav", settings, 160_000)


def large_adapter(folder: Path, rank: int) -> Path:
    """An adapter of this rank, whose file of zeros takes no room on the disk."""
    save_adapter(tiny.adapter(), folder)
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "r": rank}), encoding="utf-8")
    nbytes, header = 4 * rank * tiny.WIDTH, {}
    for index, (name, shape) in enumerate(((tiny.A, [rank, tiny.WIDTH]), (tiny.B, [tiny.WIDTH, rank]))):
        offsets = [index * nbytes, (index + 1) * nbytes]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (folder / TENSOR_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * nbytes)
    return folder


def test_a_large_adapter(classifier: Path, tmp_path: Path) -> None:
    """Whatever it is for: to run it, to keep it loaded, to start from it, or a fresh one and its scalings."""
    rank = 358 * 10**6 // (8 * tiny.WIDTH)
    path = large_adapter(tmp_path / "large", rank)
    batch = {"input_ids": np.array([[1, 2, 3]] * 2)}
    release_freed_memory()
    budget_bytes = read_memory().resident_bytes + 64 * MIB
    peak = PeakMemory()
    with edgepeft.load(classifier, memory_budget=budget_bytes) as model:
        for call in (
            lambda: model.forward(batch, path),
            lambda: model.forward(batch, [path, "mine"]),
            lambda: model.load_adapter("large", path),
            lambda: model.predict([{"input_ids": [1, 2]}], path),
            lambda: model.adapt(tiny.records(), tmp_path / "out", adapter=str(path)),
            lambda: model.adapt(tiny.records(), tmp_path / "out", rank=rank),
        ):
            with pytest.raises(BudgetError, match=r"adapter.* takes (682|725)\.") as caught:
                call()
            assert caught.value.required_bytes > 682 * MIB
        model.forward(batch, "mine")  # goes on
    assert peak.nbytes <= budget_bytes


def test_a_large_header(classifier: Path, tmp_path: Path) -> None:
    """Of an adapter's file: it is parsed whole."""
    path = large_adapter(tmp_path / "large", 8)
    for nbytes, error, message in (
        (15 * MIB, BudgetError, r"its header takes 150\.0 MiB"),
        (90 * MIB, AdapterError, "its header has 94,371,840 B, expected at most"),
    ):
        text = b"{}".ljust(nbytes)
        (path / TENSOR_FILE).write_bytes(len(text).to_bytes(8, "little") + text)
        del text
        release_freed_memory()
        budget_bytes = read_memory().resident_bytes + 64 * MIB
        model = edgepeft.load(classifier, memory_budget=budget_bytes)
        with model, pytest.raises(error, match=message):
            model.predict([{"input_ids": [1, 2]}], path)


def test_a_rank_that_only_the_configuration_has(tmp_path: Path) -> None:
    """Takes nothing."""
    save_adapter(tiny.adapter(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text("utf-8"))
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**config, "r": 1_000_000}), encoding="utf-8")
    with room(16), pytest.raises(AdapterError, match="gives rank 1000000, its lora_A has"):
        load_adapter(tmp_path / "a")


def test_a_large_prompt_cache(language_model: Path, tmp_path: Path) -> None:
    """By its size, before any of it is looked at."""
    spec = {"dtype": "F32", "shape": [90 * MIB], "data_offsets": [0, 360 * MIB]}
    text = json.dumps({"__metadata__": {}, "keys": spec}).encode()
    with (tmp_path / "prompt").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 360 * MIB)
    manifest = open_bundle(language_model).manifest
    with room(16), pytest.raises(BudgetError, match=r"the prompt cache takes 360\.0 MiB of memory"):
        open_prompt_cache(tmp_path / "prompt", manifest)


def test_room_is_made_before_anything_is_refused() -> None:
    """By what the caller can have again."""
    release_freed_memory()
    held = mmap.mmap(
        -1, 40 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # malloc may have room for it, and keep it
    for place in range(0, len(held), mmap.PAGESIZE):
        held[place] = 1
    budget_bytes = read_memory().resident_bytes + 8 * MIB
    with within(budget_bytes, held.close):
        check_room(MIB, "little")
        assert not held.closed
        check_room(30 * MIB, "much")
        assert held.closed
        with pytest.raises(
            BudgetError, match=r"too much takes 80\.0 MiB of memory, the process holds"
        ) as caught:
            check_room(80 * MIB, "too much")
    assert caught.value.budget_bytes == budget_bytes
    check_room(2**50, "anything, without a budget")


def test_sessions_are_closed_to_make_room(classifier: Path) -> None:
    """And opened again by the next call, with the same results."""
    batch = {"input_ids": np.array([[1, 2, 3]])}
    release_freed_memory()  # what other tests left, or there is more room than is meant
    with edgepeft.load(classifier, memory_budget=read_memory().resident_bytes + 64 * MIB) as model:
        want = model.forward(batch, "mine")["logits"]
        assert model._sessions._open
        with model._reading(), pytest.raises(BudgetError, match="a record takes"):
            check_room(100 * MIB, "a record")
        assert not model._sessions._open
        np.testing.assert_array_equal(model.forward(batch, "mine")["logits"], want)


def test_a_long_prompt(language_model: Path) -> None:
    """Is refused before it is encoded."""
    budget_bytes = read_memory().resident_bytes + 128 * MIB
    with (
        edgepeft.load(language_model, memory_budget=budget_bytes) as model,
        pytest.raises(BudgetError, match=r"a prompt of 1\.9 MiB takes 566\.5 MiB"),
    ):
        model.generate("ab " * 660_000)


def test_batches_of_mixed_shapes_find_their_arena_whole(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger one has the session opened again, on a region for it; a smaller one does not. No result lies
    in an arena, where it would keep it."""
    regions: list[int] = []
    renew = sessions.renew_shared_arena
    monkeypatch.setattr(sessions, "renew_shared_arena", lambda size: (regions.append(size), renew(size)))
    budget_bytes = read_memory().resident_bytes + 512 * MIB
    with edgepeft.load(classifier, memory_budget=budget_bytes) as model:
        found = []
        for tokens in (4, 2, 8, 3, 4):
            found.append(model.forward({"input_ids": np.ones((2, tokens), np.int64)})["logits"])
            plan = model._sessions.plan
            assert plan is not None
            assert regions[-1] >= plan.session_bytes + plan.activation_bytes
        assert all(array.flags.owndata for array in found)
        np.testing.assert_array_equal(found[0], found[-1])
    assert len(regions) == 2
    assert regions[1] >= 2 * regions[0], "lengths that grow by one open no session each"
