"""Tasks on text: records to token rows, rows to padded batches."""

from collections.abc import Sequence

import numpy as np

from edgepeft.errors import DataError

from ..adapters.virtual_tokens import in_front
from ..inputs import IGNORED_LABEL
from ..records import Record
from .base import Task, field_names
from .examples import Array, Example, Row, shown

PAIR = "text_pair"


class TokenTask(Task):
    """A task whose model takes `input_ids`."""

    takes_pairs = False
    """Whether a record may have a `text_pair`: a second text of one input."""

    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """Pad examples to their longest row; pairs become the first rows of all and then the second rows of
        all."""
        rows = [
            row for position in range(len(examples[0].rows)) for row in (ex.rows[position] for ex in examples)
        ]
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        ids = np.full(shape, self.manifest.model.pad_token_id or 0, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            size = len(row.input_ids)
            ids[index, :size], mask[index, :size], types[index, :size] = row.input_ids, 1, row.type_ids
        batch: dict[str, Array] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        batch = {name: value for name, value in batch.items() if name in self._inputs}
        if training:
            batch.update(self.labels(examples, shape))
        if self.virtual is not None:
            batch = in_front(self.manifest, batch, [self.virtual] * len(ids))
        return batch

    def labels(self, examples: Sequence[Example], shape: tuple[int, int]) -> dict[str, Array]:
        """What a batch of this shape has to learn: the rows' own labels, int64 as long as the rows."""
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        for index, example in enumerate(examples):
            row = example.rows[0]
            if row.labels is not None:
                labels[index, : len(row.labels)] = row.labels
        return {"labels": labels}

    def tokens(self, record: Record, field: str, max_length: int) -> tuple[Row, bool]:
        """The row of a field that holds a text or a list of token ids, and whether it was cut.

        Raises:
            DataError: the field is missing, is neither, is empty or holds a token out of range.
        """
        value = record.fields.get(field)
        pair = record.fields.get(PAIR)
        if pair is not None and not (self.takes_pairs and isinstance(value, str) and isinstance(pair, str)):
            raise DataError(
                f"{record.where}: {PAIR} is {shown(pair)} beside {field} {shown(value)}: "
                + (
                    "expected two texts"
                    if self.takes_pairs
                    else f"{self.manifest.task} reads one text of a record"
                )
            )
        if isinstance(value, str):
            cut = self.text.cut(value, max_length, pair)
            return _row(record, field, cut.ids, cut.type_ids), cut.truncated
        ids = self.token_list(record, field)
        types = (
            self.token_list(record, "token_type_ids") if "token_type_ids" in record.fields else [0] * len(ids)
        )
        if len(types) != len(ids):
            raise DataError(
                f"{record.where}: token_type_ids has {len(types)} entries, {field} has {len(ids)}"
            )
        return _row(record, field, ids[:max_length], types[:max_length]), len(ids) > max_length

    def token_list(self, record: Record, field: str) -> list[int]:
        """A field that holds a list of token ids.

        Raises:
            DataError: it does not, or an id is outside the vocabulary.
        """
        value = record.fields.get(field)
        if value is None and field in record.fields:
            raise DataError(f"{record.where}: {field} is null, expected a text or a list of token ids")
        if value is None:
            raise DataError(f"{record.where}: lacks the field {field!r}, it has {field_names(record)}")
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise DataError(
                f"{record.where}: {field} is {shown(value)}, expected a text or a list of token ids"
            )
        limit = self.manifest.model.vocab_size
        wrong = [item for item in value if not 0 <= item < limit]
        if wrong:
            raise DataError(
                f"{record.where}: {field} holds token {wrong[0]}, the vocabulary has {limit} tokens"
            )
        return list(value)


def _row(record: Record, field: str, ids: Sequence[int], types: Sequence[int]) -> Row:
    if not ids:
        raise DataError(f"{record.where}: {field} is empty, expected at least one token")
    return Row(np.array(ids, np.int32), np.array(types, np.int32))
