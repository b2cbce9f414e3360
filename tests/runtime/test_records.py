"""Records: what each task reads, and one error with its line for what it cannot."""

import codecs
import dataclasses
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepeft.bundle.manifest import AudioPreprocessing, ImagePreprocessing, TensorSpec
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import BundleError, DataError, MissingExtraError
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import Example, Task, task_for

from . import tiny


def encode(task: Task, fields: dict[str, Any], training: bool = True, max_length: int = 16) -> Example:
    return task.encode_all(records([fields]), max_length, training=training)[0]


@pytest.fixture
def classify(classifier: Path) -> Task:
    return task_for(open_bundle(classifier))


@pytest.fixture
def embed(encoder: Path) -> Task:
    return task_for(open_bundle(encoder))


@pytest.fixture
def write(language_model: Path) -> Task:
    return task_for(open_bundle(language_model))


def test_lines_come_one_at_a_time_with_their_numbers(tmp_path: Path) -> None:
    """Blank lines count, a byte-order mark and a missing last newline do not matter."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\xc3\xa4"}')
    assert [(record.where, record.fields["text"]) for record in records(path)] == [
        (f"{path}:1", "a"),
        (f"{path}:4", "ä"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b"'text'", "is not JSON"),
        (b'["a"]', "is a JSON list"),
        (b"[", r"write one object a line, as jq -c '\.\[\]' makes them of an array"),
        (b"3", "is a JSON int"),
        ('{"text": "a"}'.encode("utf-16"), "save the file as UTF-8, such as with iconv -f utf-16"),
        (gzip.compress(b'{"text": "a"}', mtime=0), "it is packed with gzip, unpack it first with gunzip"),
        (b'{"text": "\xff"}', r"is not UTF-8 \(byte 0xff at 11\): save the file as UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'"' + b"x" * 2**24, "longer than"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    """The second of three."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=message) as caught:
        list(records(path))
    assert f"{path}:2" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n \n", codecs.BOM_UTF8, codecs.BOM_UTF8 + b"\r\n"])
def test_no_records_at_all(tmp_path: Path, content: bytes) -> None:
    """An empty file, a file of empty lines, an empty list."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    for source in (path, str(path), []):
        with pytest.raises(DataError, match="holds no records"):
            list(records(source))


def test_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `-`; a file of that name is `./-`, or a `Path`."""

    def typed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    typed(b'{"text": "a"}\n\n{"text": "b"}')
    assert [(record.where, record.folder) for record in records("-")] == [
        ("standard input:1", Path()),
        ("standard input:3", Path()),
    ]
    for content, message in (
        (b"", "standard input: holds no records"),
        (b"{", "standard input:1: is not JSON"),
    ):
        typed(content)
        with pytest.raises(DataError, match=message):
            list(records("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input: is closed"):
        list(records("-"))
    monkeypatch.chdir(tmp_path)
    Path("-").write_text('{"text": "c"}', encoding="utf-8")
    for source in ("./-", Path("-")):
        assert [record.fields["text"] for record in records(source)] == ["c"]


def picture_task(classifier: Path) -> Task:
    """A classifier of images of 2 x 2 pixels, with nothing behind it."""
    bundle = open_bundle(classifier)
    inference = bundle.manifest.graphs["inference"]
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, 2, 2))
    manifest = dataclasses.replace(
        bundle.manifest,
        task="image-classification",
        graphs={"inference": dataclasses.replace(inference, inputs=(pixels,))},
        image_preprocessing=ImagePreprocessing("nearest", 1.0, (0.0,) * 3, (1.0,) * 3),
    )
    return task_for(Bundle(bundle.path, manifest))


def recording_task(classifier: Path) -> Task:
    """A classifier of recordings, with nothing behind it."""
    bundle = open_bundle(classifier)
    manifest = dataclasses.replace(
        bundle.manifest, task="audio-classification", audio_preprocessing=AudioPreprocessing(8_000, False)
    )
    return task_for(Bundle(bundle.path, manifest))


@pytest.mark.parametrize("field", ["image", "pixel_values", "audio", "input_values"])
def test_files_are_found_from_the_data_files_folder(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Not from the working directory, but for standard input and for records from Python; an absolute path is
    one from anywhere."""
    task = picture_task(classifier) if field in ("image", "pixel_values") else recording_task(classifier)
    shape = {"image": (2, 2, 3), "pixel_values": (3, 2, 2)}.get(field, (5,))
    here, there = tmp_path / "here", tmp_path / "there"
    for value, folder in enumerate((here, there / "files"), start=1):
        folder.mkdir(parents=True)
        np.save(folder / "x.npy", np.full(shape, value, np.uint8 if field == "image" else np.float32))
    data = there / "data.jsonl"
    monkeypatch.chdir(here)

    def values(source: Any) -> list[float]:
        examples = task.encode_all(records(source), 100, training=True)
        return [float(np.unique(example.values)[0]) for example in examples if example.values is not None]

    lines = [{field: str(path), "label": 0} for path in ("files/x.npy", here / "x.npy", "../here/x.npy")]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert values(data) == values(str(data)) == values("../there/data.jsonl") == [2, 1, 1]
    assert values([{field: "x.npy", "label": 0}]) == [1]
    monkeypatch.setattr(
        sys,
        "stdin",
        io.TextIOWrapper(io.BytesIO(json.dumps({field: "x.npy", "label": 0}).encode()), encoding="utf-8"),
    )
    assert values("-") == [1]
    data.write_text(json.dumps({field: "x.npy", "label": 0}))
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {field}.*there/x\.npy"):
        values(data)


def test_a_missing_file_and_a_wrong_record(tmp_path: Path) -> None:
    """From the system and from Python."""
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        list(records(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="record 2: is a str"):
        list(records([{"text": "a"}, "b"]))  # type: ignore[list-item]


def test_text_and_ids_are_the_same_record(classify: Task) -> None:
    """Labels by name, by number and by numpy number."""
    for fields in (
        {"text": "w3 w4", "label": "green"},
        {"input_ids": [3, 4], "label": 1},
        {"input_ids": np.array([3, 4]), "labels": np.int64(1)},
    ):
        example = encode(classify, fields)
        assert example.rows[0].input_ids.tolist() == [3, 4]
        assert example.label == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "w1", "label": "purple"}, "label 'purple' was not known .* 3: red, green, blue"),
        ({"text": "w1", "label": 3}, "label 3 was not known"),
        ({"text": "w1", "label": -1}, "label -1 was not known"),
        ({"text": "w1", "label": 1.0}, "label is 1.0"),
        ({"text": "w1", "label": True}, "label is True"),
        ({"text": "w1"}, 'needs a "label"'),
        ({"label": "red"}, "has the fields 'label'"),
        ({"text": 3, "label": "red"}, "text is 3, expected a text"),
        ({"text": None, "label": "red"}, "text is null, expected a text"),
        ({"text": "", "label": "red"}, "text is empty"),
        ({"text": "\ud800", "label": "red"}, "not valid Unicode"),
        ({"input_ids": [1, 24], "label": "red"}, "holds token 24"),
        ({"input_ids": [1, True], "label": "red"}, "expected a text or a list"),
        ({"input_ids": [1], "token_type_ids": [0, 0], "label": "red"}, "token_type_ids has 2 entries"),
    ],
)
def test_a_classification_record_that_cannot_be_used(
    classify: Task, fields: dict[str, Any], message: str
) -> None:
    """With the line it stands on."""
    with pytest.raises(DataError, match=rf"^record 1: .*{message}"):
        encode(classify, fields)


def test_a_label_is_not_needed_to_predict(classify: Task) -> None:
    """But kept where it is given."""
    assert encode(classify, {"text": "w1"}, training=False).label is None
    assert encode(classify, {"text": "w1", "label": "blue"}, training=False).label == 2


def test_long_texts_are_cut_and_counted(classify: Task) -> None:
    """Exactly the longest allowed is not cut."""
    text = " ".join(f"w{index}" for index in range(1, 9))
    assert not encode(classify, {"text": text, "label": 0}, max_length=8).truncated
    cut = encode(classify, {"text": text, "label": 0}, max_length=5)
    assert (cut.rows[0].input_ids.tolist(), cut.truncated) == ([1, 2, 3, 4, 5], True)
    cut = encode(classify, {"input_ids": [1, 2, 3], "label": 0}, max_length=2)
    assert (cut.length, cut.truncated) == (2, True)


def test_a_batch_is_padded_on_the_right(classify: Task) -> None:
    """To its own longest row."""
    examples = [encode(classify, {"input_ids": ids, "label": 0}) for ids in ([5], [6, 7, 8])]
    batch = classify.batch(examples, training=True)
    assert batch["input_ids"].tolist() == [[5, 0, 0], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 0]
    assert "token_type_ids" not in batch  # the graph takes none
    assert "labels" not in classify.batch(examples, training=False)


def test_pairs_become_anchors_and_then_positives(embed: Task) -> None:
    """As the contrastive loss expects its rows."""
    pairs = [{"anchor": [1], "positive": "w2 w3"}, {"anchor": "w4", "positive": [5]}]
    batch = embed.batch([encode(embed, pair) for pair in pairs], training=True)
    assert batch["input_ids"].tolist() == [[1, 0], [4, 0], [2, 3], [5, 0]]
    assert embed.items(batch) == 2
    assert "labels" not in batch
    with pytest.raises(DataError, match='"anchor", "positive"'):
        encode(embed, {"text": "w1"})
    assert encode(embed, {"text": "w1"}, training=False).rows[0].input_ids.tolist() == [1]


def test_masks_behind_the_cut_are_not_asked_for(tmp_path: Path) -> None:
    """Nor are the labels of words there, where one before it has one."""
    bundle = open_bundle(tiny.write_bundle(tmp_path / "b", tokenizer=tiny.word_tokenizer()))
    model = dataclasses.replace(bundle.manifest.model, mask_token_id=9)
    manifest = dataclasses.replace(bundle.manifest, model=model)

    def task(name: str) -> Task:
        return task_for(Bundle(bundle.path, dataclasses.replace(manifest, task=name)))

    mask, words = task("fill-mask"), task("token-classification")
    row = encode(mask, {"text": "w1 w9 w2 w9", "labels": ["w3", "w4"]}, max_length=3).rows[0]
    assert row.labels is not None
    assert row.labels.tolist() == [-100, 3, -100]
    with pytest.raises(DataError, match="record 1: its first 3 tokens hold no mask to fill"):
        encode(mask, {"text": "w1 w1 w1 w9", "labels": ["w3"]}, max_length=3)
    with pytest.raises(DataError, match="a list of 1 tokens, one a mask"):
        encode(mask, {"text": "w1 w9", "labels": ["w3", "w4"]})
    row = encode(words, {"tokens": ["w1"] * 3000, "labels": [0, 1, 2] * 1000}, max_length=3).rows[0]
    assert row.labels is not None
    assert row.labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="record 1: all labels of its first 3 tokens are -100"):
        encode(words, {"tokens": ["w1"] * 4, "labels": [-100, -100, -100, 1]}, max_length=3)


def test_a_bundle_without_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    """The error says so."""
    task = task_for(open_bundle(tiny.write_bundle(tmp_path / "b")))
    assert encode(task, {"input_ids": [1], "label": 0}).length == 1
    with pytest.raises(BundleError, match=r"holds no tokenizer\.json: give input_ids"):
        encode(task, {"text": "w1", "label": 0})


def test_padding_and_truncation_of_the_tokenizer_file_are_ignored(tmp_path: Path) -> None:
    """Sentence encoders ship with both switched on, at lengths of their own."""
    content = tiny.word_tokenizer()
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    folder = tiny.write_bundle(tmp_path / "b", tokenizer=content)
    example = encode(task_for(open_bundle(folder)), {"text": "w1 w2 w3", "label": 0})
    assert example.rows[0].input_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("package", "extra", "fields"),
    [("tokenizers", "text", {"text": "w1"}), ("jinja2", "chat", {"messages": []})],
)
def test_a_missing_extra_names_its_install_line(
    write: Task, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, fields: dict[str, Any]
) -> None:
    """Where the base install meets text, or messages."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf'needs the package {package}: pip install "edgepeft\[{extra}\]"'
    ):
        encode(write, fields)


def test_a_label_that_is_nearly_one_is_pointed_out(classifier: Path) -> None:
    name = tiny.LABELS[0]
    with pytest.raises(DataError, match=rf"did you mean '{name}'\?"):
        task_for(open_bundle(classifier)).encode_all(
            records([{"input_ids": [3], "label": name.upper()[:1] + name[1:]}]), 8, training=True
        )
