"""A shorter context than the model's: what the bundle reads, and what it takes."""

from pathlib import Path

import pytest

import edgepeft
from edgepeft.errors import ContextError, UsageError

from . import models, task_models


def test_a_shorter_context_has_shorter_tables_and_the_same_answers(tmp_path: Path) -> None:
    model = models.llama(tied=True)
    whole = edgepeft.export(model, tmp_path / "whole", rank=2)
    short = edgepeft.export(model, tmp_path / "short", rank=2, max_length=24)
    assert (whole.model.max_length, short.model.max_length) == (64, 24)
    for name in ("rotary.cos.0", "rotary.sin.0"):
        assert (whole.weights[name].shape[0], short.weights[name].shape[0]) == (64, 24)
    prompt = [3, 5, 8, 13, 21]
    with edgepeft.load(tmp_path / "whole") as device:
        expected = device.generate_ids(prompt, max_new_tokens=12)
    with edgepeft.load(tmp_path / "short") as device:
        assert device.generate_ids(prompt, max_new_tokens=12) == expected
        with pytest.raises(ContextError, match="24"):
            device.generate_ids(prompt, max_new_tokens=40)


def test_texts_are_cut_where_the_bundle_ends(tmp_path: Path) -> None:
    manifest = edgepeft.export(
        models.bert_classifier(), tmp_path / "bundle", rank=2, max_length=16, train=False, verify=False
    )
    assert manifest.model.max_length == 16


@pytest.mark.parametrize(
    ("length", "match"), [(65, "reads at most 64 tokens"), (0, "one token or more, got 0")]
)
def test_lengths_that_the_model_does_not_have_are_refused(length: int, match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        edgepeft.export(models.llama(tied=True), tmp_path / "bundle", max_length=length)
    assert list(tmp_path.iterdir()) == []


def test_pictures_have_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads none"):
        edgepeft.export(task_models.vit(), tmp_path / "bundle", max_length=8)
