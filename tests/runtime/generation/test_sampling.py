"""Penalty, temperature, top-k, top-p and min-p against transformers' processors, and the draw against its
distribution."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.runtime.generation.options import GenerationOptions
from edgepeft.runtime.generation.sampling import Sampler, candidates, penalized

VOCAB = 97


def theirs(logits: np.ndarray, seen: list[int], options: dict[str, Any]) -> np.ndarray:
    """Probabilities by transformers, in its order; float32, as it draws from."""
    kinds: list[tuple[str, Any]] = [
        ("repetition_penalty", transformers.RepetitionPenaltyLogitsProcessor),
        ("temperature", transformers.TemperatureLogitsWarper),
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
        ("min_p", transformers.MinPLogitsWarper),
    ]
    scores = torch.from_numpy(logits)[None].clone()
    for name, kind in kinds:
        if options.get(name) is not None:
            scores = kind(options[name])(torch.tensor([seen]), scores)
    return scores.softmax(-1)[0].numpy()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 2 * VOCAB),
    top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
)
def test_probabilities_are_those_of_transformers(seed: int, **options: Any) -> None:
    """All of them together, whichever are given; tokens at the edge of top-p and min-p may differ by
    rounding, and equal logits are kept together."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(VOCAB) * 3).astype(np.float32)
    seen = rng.integers(0, VOCAB, 30).tolist()
    expected = theirs(logits, seen, options)
    chosen = GenerationOptions(**options)
    tokens, probabilities = candidates(penalized(logits, seen, chosen.repetition_penalty), chosen)
    got = np.zeros(VOCAB, np.float32)
    got[tokens] = probabilities
    if (differing := np.flatnonzero((got > 1e-30) != (expected > 1e-30))).size:
        assert differing.size == 1
        assert _is_at_an_edge(logits, seen, options)
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def _is_at_an_edge(logits: np.ndarray, seen: list[int], options: dict[str, Any]) -> bool:
    """Whether thresholds a millionth apart keep different tokens."""
    kept = set()
    for factor in (1 - 1e-5, 1 + 1e-5):
        moved = dict(options)
        for name in ("top_p", "min_p"):
            if moved[name] is not None:
                moved[name] = min(moved[name] * factor, 1.0)
        kept.add(tuple(theirs(logits, seen, moved) > 0))
    return len(kept) > 1


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    """Chi-squared over 20,000 draws, 9 degrees of freedom: beyond 33.7 one time in 10,000."""
    logits = np.random.default_rng(0).standard_normal(10).astype(np.float32)
    sampler = Sampler(GenerationOptions(temperature=0.7, seed=1))
    drawn = np.bincount([sampler.choose(logits, ()) for _ in range(20_000)], minlength=10)
    expected = 20_000 * theirs(logits, [0], {"temperature": 0.7}).astype(np.float64)
    assert ((drawn - expected) ** 2 / expected).sum() < 33.7


def test_a_seed_decides_the_draws() -> None:
    """The same seed the same ones; rows of a batch differ, and row 1 is the next seed's row 0."""
    logits = np.zeros(50, np.float32)

    def draws(seed: int | None, row: int = 0) -> list[int]:
        sampler = Sampler(GenerationOptions(temperature=1, seed=seed), row)
        return [sampler.choose(logits, ()) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(3, row=1) == draws(4)
    assert draws(None) != draws(None)


def test_greedy_counts_the_penalty() -> None:
    """As in transformers, the likeliest token after it."""
    logits = np.array([3, 2, -1], np.float32)
    assert Sampler(GenerationOptions()).choose(logits, [0]) == 0
    assert Sampler(GenerationOptions(repetition_penalty=2.0)).choose(logits, [0]) == 1


def test_logits_that_are_no_numbers_are_refused() -> None:
    """Instead of a token that means nothing."""
    sampler = Sampler(GenerationOptions(temperature=1))
    with pytest.raises(EdgePeftError, match="3 of the model's 3 logits are not finite numbers"):
        sampler.choose(np.full(3, np.nan, np.float32), ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected 0, or 0.001 to 1,000"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "warm"}, "wrong type"),
        ({"top_k": 0, "temperature": 1}, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0, "temperature": 1}, "top_p is 0.0, expected more than 0"),
        ({"min_p": 1.5, "temperature": 1}, "min_p is 1.5, expected 0 to 1"),
        ({"top_p": 0.9}, "top_p chooses among draws, and at temperature 0 nothing is drawn"),
        ({"temperature": 1e-300}, "temperature is 1e-300, expected 0, or 0.001"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected 0.001 to 1,000"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300, expected 0.001"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"seed": "x"}, "seed is 'x', expected a whole number"),
        ({"stop": ["a", ""]}, "stop is .*, expected texts that are not empty"),
        ({"heat": 1}, "takes no option 'heat': it takes max_new_tokens, temperature"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    """By name."""
    with pytest.raises(UsageError, match=message):
        GenerationOptions.of(options)
