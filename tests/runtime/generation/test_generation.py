"""Greedy generation with a cache equals generation without one."""

from pathlib import Path

import numpy as np
import pytest

import edgepeft
from edgepeft.errors import UsageError
from edgepeft.runtime.model import Model

from .. import tiny


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A language model with two trained adapters."""
    adapters = {
        name: tiny.adapter(rank=rank, seed=seed, task="text-generation", trained=True)
        for name, rank, seed in (("one", 2, 3), ("two", 3, 4))
    }
    return tiny.write_bundle(
        tmp_path / "b", "text-generation", adapters=adapters, tokenizer=tiny.word_tokenizer()
    )


def without_cache(model: Model, prompt: list[int], adapter: object, count: int) -> list[int]:
    """Run the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits = model.forward({"input_ids": [ids]}, adapter)["logits"]  # type: ignore[arg-type]
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tiny.EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapter", [None, "one", {"one": 0.6, "two": 0.4}])
def test_the_cache_changes_nothing(bundle: Path, adapter: object) -> None:
    """Several prompts in one session, forward passes in between."""
    with edgepeft.load(bundle) as model:
        for prompt in ([1], [5, 9, 2], [7, 7, 7, 7, 7]):
            expected = without_cache(model, prompt, adapter, 8)
            assert model.generate_ids(prompt, adapter, max_new_tokens=8) == expected  # type: ignore[arg-type]


def test_it_ends_at_the_end_of_sequence(bundle: Path) -> None:
    """The token is part of the ids and not of the text."""
    with edgepeft.load(bundle) as model:
        ends = [
            (prompt, answer)
            for prompt in range(1, 22)
            if (answer := model.generate_ids([prompt], "two", max_new_tokens=12))[-1] == tiny.EOS
        ]
        assert ends, "no prompt leads the tiny model to its end token: choose another seed"
        prompt, answer = ends[0]
        assert len(answer) < 12
        text = model.generate(f"w{prompt}", "two", max_new_tokens=12)
        assert text == " ".join(f"w{token}" for token in answer[:-1])


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 4, "the prompt has no tokens"),
        ([1], 0, "max_new_tokens is 0"),
        ([1] * 10, 7, "10 tokens and 7 more .* holds 16: .*--max-new-tokens to 6"),
        ([1] * 20, 1, "--max-new-tokens to 0"),
        ([1, 99], 4, "holds token 99"),
    ],
)
def test_what_the_context_cannot_hold_is_refused_first(
    bundle: Path, prompt: list[int], count: int, message: str
) -> None:
    """Before a session is opened."""
    with edgepeft.load(bundle) as model, pytest.raises(UsageError, match=message):
        model.generate_ids(prompt, max_new_tokens=count)


def test_only_language_models_generate(classifier: Path, language_model: Path) -> None:
    """And only the others predict."""
    with (
        edgepeft.load(classifier) as model,
        pytest.raises(UsageError, match="generates no text: use predict"),
    ):
        model.generate("w1")
    with edgepeft.load(language_model) as model, pytest.raises(UsageError, match="use generate"):
        model.predict([{"text": "w1"}])


def test_prediction(classifier: Path, encoder: Path) -> None:
    """Batches of any size give the same answers, in order; labels are told beside them."""
    records = tiny.records(11)
    with edgepeft.load(classifier) as model:
        whole = model.predict(records, batch_size=100)
        pieces = model.predict(records, batch_size=3)
        direct = [model.forward({"input_ids": [record["input_ids"]]})["logits"][0] for record in records]
    for one, other, record, logits in zip(whole, pieces, records, direct, strict=True):
        assert one["label"] == other["label"] == tiny.LABELS[int(logits.argmax())]
        assert one["expected"] == record["label"]
        assert sum(one["scores"].values()) == pytest.approx(1)
        assert one["score"] == max(one["scores"].values()) == pytest.approx(other["score"])
    with edgepeft.load(encoder) as model:
        vectors = np.array(
            [item["embedding"] for item in model.predict([{"text": "w1 w2"}, {"input_ids": [3]}])]
        )
    assert vectors.shape == (2, tiny.WIDTH)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
