"""Records of a language model: what of them is learned, and what is left of those that are too long."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import DataError
from edgepeft.runtime.tasks import Task, task_for

from ..test_records import encode


@pytest.fixture
def write(language_model: Path) -> Task:
    return task_for(open_bundle(language_model))


@pytest.mark.parametrize(
    ("fields", "ids", "labels"),
    [
        ({"text": "w1 w2"}, [1, 2, 23], [1, 2, 23]),
        ({"text": "w1 w2 </s>"}, [1, 2, 23], [1, 2, 23]),
        ({"prompt": "w1 w2", "completion": "w3"}, [1, 2, 3, 23], [-100, -100, 3, 23]),
        ({"prompt": [1, 2], "completion": [3]}, [1, 2, 3, 23], [-100, -100, 3, 23]),
        ({"input_ids": [1, 2, 3]}, [1, 2, 3], [1, 2, 3]),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, [1, 2, 3], [-100, 2, 3]),
    ],
)
def test_prompts_are_not_learned(
    write: Task, fields: dict[str, Any], ids: list[int], labels: list[int]
) -> None:
    """Labels are unshifted, prompts -100, and text ends with the end-of-sequence token."""
    example = encode(write, fields)
    row = example.rows[0]
    assert row.labels is not None
    assert (row.input_ids.tolist(), row.labels.tolist()) == (ids, labels)
    batch = write.batch([example], training=True)
    assert write.items(batch) == sum(label != -100 for label in labels[1:])


@pytest.mark.parametrize(
    ("prompt", "completion", "kept", "learned"),
    [
        (4, 20, 4, 12),  # the completion loses its end
        (20, 3, 12, 4),  # the prompt its beginning
        (20, 20, 8, 8),  # each half
        (10, 20, 8, 8),
        (500, 1, 14, 2),
        (13, 2, 13, 3),  # all of it fits
    ],
)
def test_what_is_too_long_is_cut_so_that_something_is_learned(
    write: Task, prompt: int, completion: int, kept: int, learned: int
) -> None:
    """A prompt keeps its end, a completion its beginning; of texts, of token ids, and of labels given with
    them."""
    prompt_ids = [1 + index % 11 for index in range(prompt)]
    completion_ids = [12 + index % 11 for index in range(completion)]
    whole = [*completion_ids, 23]
    labels = [-100] * prompt + whole
    for fields in (
        {"prompt": prompt_ids, "completion": completion_ids},
        {
            name: " ".join(f"w{one}" for one in ids)
            for name, ids in (("prompt", prompt_ids), ("completion", completion_ids))
        },
        {"input_ids": prompt_ids + whole, "labels": labels},
    ):
        example = encode(write, fields)
        row = example.rows[0]
        assert row.labels is not None
        assert row.input_ids.tolist() == prompt_ids[prompt - kept :] + whole[:learned]
        assert row.labels.tolist() == [-100] * kept + whole[:learned]
        assert example.truncated == (prompt + len(whole) > 16)


def test_a_prompt_that_is_cut_keeps_the_token_that_begins_it(write: Task) -> None:
    """The model has seen no text without it."""
    model = dataclasses.replace(write.manifest.model, bos_token_id=1)
    task = task_for(Bundle(write.bundle.path, dataclasses.replace(write.manifest, model=model)))
    for prompt in ("w1 " + "w5 " * 3000 + "w6", [1, *[5] * 30, 6]):
        row = encode(task, {"prompt": prompt, "completion": "w2"}).rows[0]
        assert row.input_ids.tolist() == [1, *[5] * 12, 6, 2, 23]
    row = encode(task, {"prompt": "w2 w3 w4 w5 w6", "completion": "w2"}, max_length=4).rows[0]
    assert row.input_ids.tolist() == [5, 6, 2, 23]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "w1"}, "has the fields 'prompt'"),
        ({"input_ids": [4]}, "no token behind the first is to be learned"),
        ({"input_ids": [1] * 20, "labels": [-100] * 20}, "no token behind the first"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels must be a list of 2"),
        ({"input_ids": [1, 2], "labels": [1, 24]}, "labels must be"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels must be"),
        ({"input_ids": [1, 2], "labels": "ab"}, "labels must be"),
        ({"prompt": 3, "completion": "w1"}, "prompt is 3"),
    ],
)
def test_a_language_record_that_cannot_be_used(write: Task, fields: dict[str, Any], message: str) -> None:
    """Including those that have nothing to learn."""
    with pytest.raises(DataError, match=rf"^record 1: .*{message}"):
        encode(write, fields)
