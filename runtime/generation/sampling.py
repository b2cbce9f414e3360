"""The next token of its logits: the likeliest, or one drawn.

Penalty, temperature, top-k, top-p and min-p are those of transformers' `LogitsProcessor` classes, in its
order. Tokens are drawn with Python's own generator: numpy's costs a device 6.6 MiB.
"""

import random
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from edgepeft.errors import EdgePeftError

from .decoders.base import FloatArray
from .options import GenerationOptions

IntArray = npt.NDArray[np.int64]


class Sampler:
    """Chooses the tokens of one row.

    Args:
        options: how.
        row: which of several rows, so that equal prompts get different draws.
    """

    def __init__(self, options: GenerationOptions, row: int = 0) -> None:
        self._options = options
        self._random = random.Random(None if options.seed is None else options.seed + row)

    def choose(self, logits: FloatArray, seen: Iterable[int]) -> int:
        """The next token.

        Args:
            logits: float32 `[vocab]`.
            seen: tokens of the text so far.

        Raises:
            EdgePeftError: the logits are not numbers.
        """
        logits = penalized(logits, seen, self._options.repetition_penalty)
        best = int(logits.argmax())  # the first that is no number, if any is none
        if not np.isfinite(logits[best]):
            raise EdgePeftError(
                f"{(~np.isfinite(logits)).sum()} of the model's {logits.size} logits are not finite numbers, "
                "so no token can be chosen: its weights are damaged, or the adapter does not belong to it"
            )
        if self._options.temperature == 0:
            return best
        tokens, probabilities = candidates(logits, self._options)
        cumulative = probabilities.cumsum(dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])


def penalized(logits: FloatArray, seen: Iterable[int], penalty: float) -> FloatArray:
    """Logits `[vocab]` with those of seen tokens made less likely by `penalty` (more than 1)."""
    if penalty == 1:
        return logits
    ids = np.array(list(set(seen)), np.int64)
    found = logits[ids]
    result = logits.copy()
    result[ids] = np.where(found < 0, found * np.float32(penalty), found / np.float32(penalty))
    return result


def candidates(logits: FloatArray, options: GenerationOptions) -> tuple[IntArray, FloatArray]:
    """The tokens that may be drawn, ascending, and their probabilities, float32.

    Args:
        logits: float32 `[vocab]`.
        options: with a temperature above 0.
    """
    scores = logits / np.float32(options.temperature)
    tokens: IntArray = np.arange(scores.size)
    if options.top_k is not None and options.top_k < scores.size:
        kth = np.partition(scores, -options.top_k)[-options.top_k]
        tokens = np.flatnonzero(scores >= kth)  # and those that equal the last of them
    probabilities = _softmax(scores[tokens])
    if options.top_p is not None and options.top_p < 1:
        removed = 1 - options.top_p
        # Those below an equal share of what is removed are all removed: only the others are sorted.
        likely = np.sort(probabilities[probabilities > removed / probabilities.size])
        kept = likely.cumsum(dtype=np.float64) > removed - (1 - likely.sum(dtype=np.float64))
        least = likely[kept.argmax()] if kept.any() else likely[-1]
        chosen = np.flatnonzero(probabilities >= least)  # and those that equal the least likely of them
        tokens, probabilities = tokens[chosen], probabilities[chosen]
    if options.min_p is not None:
        chosen = np.flatnonzero(probabilities >= options.min_p * probabilities.max())
        tokens, probabilities = tokens[chosen], probabilities[chosen]
    return tokens, probabilities / probabilities.sum()


def _softmax(scores: FloatArray) -> FloatArray:
    powers = np.exp(scores - scores.max())
    result: FloatArray = powers / powers.sum()
    return result
