"""Sentence embedding: `{"text"}` to embed, `{"anchor", "positive"}` pairs to learn from; with the triplet
loss `{"anchor", "positive", "negative"}`."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError

from ..records import Record, RecordSource, records
from .examples import Array, Example, Outputs
from .tokens import TokenTask


class Embedding(TokenTask):
    """Sentences to vectors. The loss sees a batch as anchors and then positives; a pair's negatives are the
    others', unless records bring their own."""

    output = "sentence_embedding"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        triplets = self.manifest.model.loss == "triplet"
        self.fields = ("anchor", "positive", "negative") if triplets else ("anchor", "positive")
        self.rows_per_record = len(self.fields)
        self.minimum_batch = 1 if triplets else 2

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`."""
        if training:
            if not set(self.fields) <= record.fields.keys():
                listed = ", ".join(f'"{field}"' for field in self.fields)
                raise self.missing(record, f"{{{listed}}} to learn from")
            rows = [self.tokens(record, field, max_length) for field in self.fields]
            return Example(tuple(row for row, _ in rows), truncated=any(cut for _, cut in rows))
        for field in ("text", "input_ids", "anchor"):
            if field in record.fields:
                row, truncated = self.tokens(record, field, max_length)
                return Example((row,), truncated=truncated)
        raise self.missing(record, '{"text"} (or "input_ids")')

    def prompted(self, source: RecordSource, name: str | None) -> RecordSource:
        """Records with a prompt of the model's before their texts.

        Args:
            source: the records.
            name: of the prompt; the model's default one where None, if it has one.

        Raises:
            UsageError: the model has no prompt of that name.
        """
        model = self.manifest.model
        name = model.default_prompt if name is None else name
        if name is None:
            return source
        if name not in model.prompts:
            known = ", ".join(model.prompts) or "none"
            raise UsageError(f"the model has no prompt {name!r} (it has {known})")
        prompt = model.prompts[name]
        return [
            {**item.fields, "text": prompt + item.fields["text"]}
            if isinstance(item.fields.get("text"), str)
            else item.fields
            for item in records(source)
        ]

    def items(self, batch: Mapping[str, Array]) -> int:
        """Pairs or triplets."""
        return int(batch["input_ids"].shape[0]) // self.rows_per_record

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """The embedding of each row."""
        del batch
        return [{"embedding": row.tolist()} for row in outputs[self.output]]

    def labels(self, examples: Sequence[Example], shape: tuple[int, int]) -> dict[str, Array]:
        """None: what is near and what is far lies in the order of the rows."""
        del examples, shape
        return {}
