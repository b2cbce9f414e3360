"""What a model's own generation configuration forbids or forces, as transformers' `LogitsProcessor` classes
do, in its order."""

from collections.abc import Sequence

import numpy as np

from edgepeft.bundle.manifest import ModelInfo

from .decoders.base import FloatArray


class Rules:
    """The rules of one row.

    Args:
        model: what the manifest says of the model.
        read: tokens that the decoder has before the first one that is chosen: the prompt, or an
            encoder-decoder's start token.
        max_new_tokens: where the answer ends at the latest.
    """

    def __init__(self, model: ModelInfo, read: Sequence[int], max_new_tokens: int) -> None:
        self._settings, self._ends = model.generation, list(model.eos_token_ids)
        self._read, self._max_new_tokens = list(read), max_new_tokens
        # Most models have none, and a text is not looked at for each of its tokens then.
        settings = self._settings
        self._are_none = settings.forced_bos_token_id is None and not any(
            (
                *(settings.suppress_tokens, settings.begin_suppress_tokens, settings.forced_eos_token_ids),
                *(settings.min_length, settings.min_new_tokens),
                *(settings.no_repeat_ngram_size, settings.bad_words_ids),
            )
        )
        # Single tokens that end a text are never bad words.
        self._bad_words = [
            word for word in self._settings.bad_words_ids if len(word) > 1 or word[0] not in self._ends
        ]

    def applied(self, logits: FloatArray, written: Sequence[int]) -> FloatArray:
        """Logits `[vocab]` as the rules leave them, behind the tokens that were written so far."""
        if self._are_none:
            return logits
        settings, count = self._settings, len(written)
        length = len(self._read) + count
        forced = None
        if settings.forced_bos_token_id is not None and length == 1:
            forced = [settings.forced_bos_token_id]
        if settings.forced_eos_token_ids and count == self._max_new_tokens - 1:
            forced = list(settings.forced_eos_token_ids)
        banned = self._banned([*self._read, *written], count)
        if forced is None and not banned:
            return logits
        result = logits.copy()
        if forced is not None:
            result[:] = -np.inf
            result[forced] = 0
            banned = self._suppressed(length, count)
        result[sorted(banned)] = -np.inf
        return result

    def _banned(self, text: list[int], count: int) -> set[int]:
        settings = self._settings
        banned = self._suppressed(len(text), count)
        if len(text) < settings.min_length or count < settings.min_new_tokens:
            banned.update(self._ends)
        if settings.no_repeat_ngram_size:
            banned.update(_repeating(text, settings.no_repeat_ngram_size))
        for *before, last in self._bad_words:
            if not before or text[-len(before) :] == before:
                banned.add(last)
        return banned

    def _suppressed(self, length: int, count: int) -> set[int]:
        settings = self._settings
        # A token that is forced to be the first one is not what an answer begins with.
        forced_first = settings.forced_bos_token_id is not None and length - count == 1
        begins = count == int(forced_first)
        return {*settings.suppress_tokens, *(settings.begin_suppress_tokens if begins else ())}


def _repeating(text: list[int], size: int) -> set[int]:
    """Tokens that would end a run of `size` tokens which the text already has."""
    if len(text) < size:
        return set()
    last = text[len(text) - size + 1 :]
    return {
        text[start + size - 1]
        for start in range(len(text) - size + 1)
        if text[start : start + size - 1] == last
    }
