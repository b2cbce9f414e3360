"""Encoder-decoders: `{"prompt", "completion"}`, or `{"input_ids", "labels"}`.

The encoder reads the prompt; the decoder learns to say the completion, which its own labels shifted right
lead to (`decoder_input_ids`). Both end as the tokenizer ends a text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgepeft.errors import DataError, UsageError

from ..inputs import IGNORED_LABEL, shifted_right
from ..records import Record
from .examples import Array, Example, NothingToLearnError, Outputs, Row, shown
from .tokens import TokenTask


class Text2Text(TokenTask):
    """Tokens to other tokens."""

    output = "logits"

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`; prompt and completion are each cut to `max_length`."""
        del training
        fields = record.fields
        if "prompt" in fields and "completion" in fields:
            source, cut = self.tokens(record, "prompt", max_length)
            target, cut_target = self.tokens(record, "completion", max_length)
            return Example(
                (Row(source.input_ids, source.type_ids, target.input_ids),), None, cut or cut_target
            )
        if "input_ids" in fields and "labels" in fields:
            source, cut = self.tokens(record, "input_ids", max_length)
            labels = self._labels(record)
            kept = np.array(labels[:max_length], np.int32)
            if not (kept != IGNORED_LABEL).any():
                raise NothingToLearnError(f"{record.where}: its first {max_length} labels are all -100")
            return Example(
                (Row(source.input_ids, source.type_ids, kept),), None, cut or len(labels) > max_length
            )
        raise self.missing(record, '{"prompt", "completion"} or {"input_ids", "labels"}')

    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """See `Task.batch`; `decoder_input_ids` are the labels shifted right."""
        batch = super().batch(examples, training=False)
        labels = self._padded_labels(examples)
        batch["decoder_input_ids"] = shifted_right(self.manifest.model, labels)
        return {**batch, "labels": labels} if training else batch

    def items(self, batch: Mapping[str, Array]) -> int:
        """Labels that count."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """Refused: an encoder-decoder answers through `generate`."""
        del outputs, batch
        raise UsageError("a text2text-generation bundle predicts nothing a record: use generate")

    def _padded_labels(self, examples: Sequence[Example]) -> Array:
        rows = [row.labels for example in examples for row in example.rows if row.labels is not None]
        labels = np.full((len(rows), max(map(len, rows))), IGNORED_LABEL, np.int64)
        for padded, row in zip(labels, rows, strict=True):
            padded[: len(row)] = row
        return labels

    def _labels(self, record: Record) -> list[int]:
        value = record.fields["labels"]
        if isinstance(value, np.ndarray):
            value = value.tolist()
        limit = self.manifest.model.vocab_size
        if not isinstance(value, list | tuple) or not all(
            type(item) is int and (item == IGNORED_LABEL or 0 <= item < limit) for item in value
        ):
            raise DataError(
                f"{record.where}: labels is {shown(value)}, expected a list of token ids below {limit}, with "
                "-100 where nothing is to be learned"
            )
        return list(value)
