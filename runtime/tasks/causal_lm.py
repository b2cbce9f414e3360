"""Causal language modelling: `{"prompt", "completion"}`, `{"messages"}`, `{"text"}` or `{"input_ids"}`.

Only what the model shall learn to say is counted in the loss: labels of a prompt (and of every message but
the last) are -100. Text and completions end with the end-of-sequence token; labels are not shifted, the loss
graph shifts. What is too long is cut so that something is left to learn: a prompt keeps its end, which is
what the completion answers, and a completion its beginning.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgepeft.errors import DataError, UsageError

from ..inputs import IGNORED_LABEL
from ..records import Record
from .examples import Array, Example, NothingToLearnError, Outputs, Row
from .tokens import TokenTask


class CausalLM(TokenTask):
    """Tokens to next tokens."""

    output = "logits"

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`."""
        del training
        fields = record.fields
        if "messages" in fields:
            prompt, completion = self.chat.split(fields["messages"], record.where, fields)
            # The template writes the special tokens itself.
            prompt_ids = self._prompt(prompt, max_length, special_tokens=False)
            completion_ids = self.text.first(completion, max_length + 1, special_tokens=False)
            return self._masked(record, prompt_ids, completion_ids, max_length)
        if "prompt" in fields and "completion" in fields:
            prompt = fields["prompt"]
            if isinstance(prompt, str):
                prompt_ids = self._prompt(prompt, max_length, special_tokens=True)
            else:
                prompt_ids = self.token_list(record, "prompt")
            completion_ids = self._ids(record, "completion", max_length, special_tokens=False)
            return self._masked(record, prompt_ids, self._ended(completion_ids), max_length)
        if "text" in fields:
            ids = self._ended(self._ids(record, "text", max_length, special_tokens=True))
            return self._example(record, ids, ids, max_length)
        if "input_ids" in fields:
            ids = self.token_list(record, "input_ids")
            return self._example(record, ids, self._given_labels(record, ids), max_length)
        raise self.missing(record, '{"prompt", "completion"}, {"messages"}, {"text"} or {"input_ids"}')

    def items(self, batch: Mapping[str, Array]) -> int:
        """Labels that count: all but the first of each row and those that are -100."""
        return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """Refused: a language model answers through `generate`."""
        del outputs, batch
        raise UsageError("a text-generation bundle predicts nothing a record: use edgepeft generate")

    def _ids(self, record: Record, field: str, max_length: int, *, special_tokens: bool) -> list[int]:
        """The tokens of a field; of a text that has more than `max_length` so many that this is seen."""
        value = record.fields[field]
        if isinstance(value, str):
            return self.text.first(value, max_length + 1, special_tokens=special_tokens)
        return self.token_list(record, field)

    def _prompt(self, text: str, max_length: int, *, special_tokens: bool) -> list[int]:
        """The tokens of a prompt; of one that has more than `max_length` the first and the last so many."""
        ids = self.text.last(text, max_length + 1, special_tokens=special_tokens)
        if len(ids) > max_length:
            ids[:1] = self.text.first(text, 1, special_tokens=special_tokens)
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.manifest.model.eos_token_ids
        return ids if not eos or (ids and ids[-1] in eos) else [*ids, eos[0]]

    def _given_labels(self, record: Record, ids: list[int]) -> list[int]:
        value = record.fields.get("labels")
        if value is None:
            return ids
        if isinstance(value, np.ndarray):
            value = value.tolist()
        vocabulary = self.manifest.model.vocab_size
        if (
            not isinstance(value, list | tuple)
            or len(value) != len(ids)
            or not all(
                type(item) is int and (item == IGNORED_LABEL or 0 <= item < vocabulary) for item in value
            )
        ):
            raise DataError(
                f"{record.where}: labels must be a list of {len(ids)} token ids as long as input_ids, "
                "unshifted, with -100 where nothing is to be learned"
            )
        return list(value)

    def _masked(
        self, record: Record, prompt: Sequence[int], completion: Sequence[int], max_length: int
    ) -> Example:
        labels = [IGNORED_LABEL] * len(prompt) + list(completion)
        return self._example(record, [*prompt, *completion], labels, max_length)

    def _example(self, record: Record, ids: Sequence[int], labels: Sequence[int], max_length: int) -> Example:
        """Tokens and labels, cut where there are more than `max_length`.

        What stands before the first label is the prompt. It loses its beginning, but for the token that
        begins a sequence, and gets half of the room if what follows needs the other half.
        """
        truncated = len(ids) > max_length
        if truncated:
            counts = (index for index, label in enumerate(labels) if label != IGNORED_LABEL)
            prompt = next(counts, len(ids))
            learned = min(len(ids) - prompt, max(max_length - prompt, max_length // 2))
            start = prompt - (max_length - learned)
            begins = start > 0 and prompt - start > 1 and ids[0] == self.manifest.model.bos_token_id
            ids, labels = (
                [*values[:begins], *values[start + begins : prompt + learned]] for values in (ids, labels)
            )
        tokens, kept = np.array(ids, np.int32), np.array(labels, np.int32)
        if not (kept[1:] != IGNORED_LABEL).any():
            raise NothingToLearnError(f"{record.where}: no token behind the first is to be learned")
        return Example((Row(tokens, np.zeros_like(tokens), kept),), truncated=truncated)
