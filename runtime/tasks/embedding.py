"""Sentence embedding: `{"text"}` to embed, `{"anchor", "positive"}` pairs to learn from."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgepeft.runtime.data import Record
from edgepeft.runtime.tasks.base import Array, Example, Outputs
from edgepeft.runtime.tasks.tokens import TokenTask


class Embedding(TokenTask):
    """Sentences to vectors. The loss sees a batch as anchors and then positives; a pair's negatives are the
    others'."""

    output = "sentence_embedding"
    rows_per_record = 2
    minimum_batch = 2

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`."""
        if training:
            if not {"anchor", "positive"} <= record.fields.keys():
                raise self.missing(record, '{"anchor", "positive"} to learn from')
            anchor, cut_anchor = self.tokens(record, "anchor", max_length)
            positive, cut_positive = self.tokens(record, "positive", max_length)
            return Example((anchor, positive), truncated=cut_anchor or cut_positive)
        for field in ("text", "input_ids", "anchor"):
            if field in record.fields:
                row, truncated = self.tokens(record, field, max_length)
                return Example((row,), truncated=truncated)
        raise self.missing(record, '{"text"} (or "input_ids")')

    def items(self, batch: Mapping[str, Array]) -> int:
        """Pairs."""
        return int(batch["input_ids"].shape[0]) // 2

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """The embedding of each row."""
        del batch
        return [{"embedding": row.tolist()} for row in outputs[self.output]]

    def labels(self, examples: Sequence[Example], shape: tuple[int, int]) -> dict[str, Array]:
        """None: the other pairs of a batch are the negatives."""
        del examples, shape
        return {}
