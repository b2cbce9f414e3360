"""Causal language modelling: `{"prompt", "completion"}`, `{"messages"}`, `{"text"}` or `{"input_ids"}`.

Only what the model shall learn to say is counted in the loss: labels of a prompt (and of every message but
the last) are -100. Text and completions end with the end-of-sequence token; labels are not shifted, the loss
graph shifts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgepeft.errors import DataError, UsageError
from edgepeft.runtime.data import Record
from edgepeft.runtime.inputs import IGNORED_LABEL
from edgepeft.runtime.tasks.base import Array, Example, Outputs, Row
from edgepeft.runtime.tasks.tokens import TokenTask


class CausalLM(TokenTask):
    """Tokens to next tokens."""

    output = "logits"

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`."""
        del training
        fields = record.fields
        if "messages" in fields:
            prompt, completion = self.chat.split(fields["messages"], record.where)
            # The template writes the special tokens itself.
            return self._masked(
                record,
                self.text.encode(prompt, special_tokens=False)[0],
                self.text.encode(completion, special_tokens=False)[0],
                max_length,
            )
        if "prompt" in fields and "completion" in fields:
            prompt_ids = self._ids(record, "prompt", special_tokens=True)
            completion_ids = self._ids(record, "completion", special_tokens=False)
            return self._masked(record, prompt_ids, self._ended(completion_ids), max_length)
        if "text" in fields:
            return self._masked(
                record, [], self._ended(self._ids(record, "text", special_tokens=True)), max_length
            )
        if "input_ids" in fields:
            ids = self.token_list(record, "input_ids")
            labels = self._given_labels(record, ids)
            return self._example(record, ids, labels, max_length)
        raise self.missing(record, '{"prompt", "completion"}, {"messages"}, {"text"} or {"input_ids"}')

    def items(self, batch: Mapping[str, Array]) -> int:
        """Labels that count: all but the first of each row and those that are -100."""
        return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """Refused: a language model answers through `generate`."""
        del outputs, batch
        raise UsageError("a text-generation bundle predicts nothing a record: use edgepeft generate")

    def _ids(self, record: Record, field: str, *, special_tokens: bool) -> list[int]:
        value = record.fields[field]
        if isinstance(value, str):
            return self.text.encode(value, special_tokens=special_tokens)[0]
        return self.token_list(record, field)

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
        return self._example(
            record, [*prompt, *completion], [IGNORED_LABEL] * len(prompt) + list(completion), max_length
        )

    def _example(self, record: Record, ids: Sequence[int], labels: Sequence[int], max_length: int) -> Example:
        kept = np.array(labels[:max_length], np.int32)
        if not (kept[1:] != IGNORED_LABEL).any():
            raise DataError(
                f"{record.where}: leaves nothing to learn in its first {max_length} tokens (it has "
                f"{len(ids)}): shorten the prompt or raise --seq-len"
            )
        tokens = np.array(ids[:max_length], np.int32)
        return Example((Row(tokens, np.zeros_like(tokens), kept),), truncated=len(ids) > max_length)
