"""What the tasks have in common: records to token rows, rows to padded batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import DataError, UsageError
from edgepeft.runtime.chat import ChatTemplate
from edgepeft.runtime.data import Record
from edgepeft.runtime.inputs import IGNORED_LABEL, adapter_input_names
from edgepeft.runtime.text import Text

Array = npt.NDArray[np.generic]
Outputs = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Row:
    """One row of a batch: int32 tokens, token types and, for language models, labels of the same length."""

    input_ids: npt.NDArray[np.int32]
    type_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Example:
    """One encoded record: its rows (two for a pair of sentences) and its class, where it has one."""

    rows: tuple[Row, ...]
    label: int | None = None
    truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' arrays."""
        return sum(
            row.input_ids.nbytes + row.type_ids.nbytes + (0 if row.labels is None else row.labels.nbytes)
            for row in self.rows
        )


class Task(ABC):
    """Records in, batches and results out. The tokenizer is loaded when the first text is met."""

    output: str
    """Name of the inference graph's output that holds the result."""
    rows_per_record = 1
    """Rows of a batch that one training record makes."""
    minimum_batch = 1
    """Records below which a batch has no gradient."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._text: Text | None = None
        self._chat: ChatTemplate | None = None
        filled = adapter_input_names(self.manifest)
        self._inputs = {spec.name for spec in self.manifest.graphs["inference"].inputs} - filled

    @property
    def text(self) -> Text:
        """The bundle's tokenizer."""
        if self._text is None:
            self._text = Text(self.bundle)
        return self._text

    @property
    def chat(self) -> ChatTemplate:
        """The bundle's chat template."""
        if self._chat is None:
            self._chat = ChatTemplate(self.bundle)
        return self._chat

    def release(self) -> None:
        """Let the tokenizer go; a vocabulary is megabytes that training does not need."""
        self._text = None
        self._chat = None

    @abstractmethod
    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """Turn a record into tokens, cut to `max_length`; with `training`, its labels are required.

        Raises:
            DataError: the record lacks a field or has one that cannot be used; the message says where it
                stands.
        """

    @abstractmethod
    def items(self, batch: Mapping[str, Array]) -> int:
        """Over how many items the loss graph averages this batch."""

    @abstractmethod
    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """What `predict` returns for each record of a batch."""

    def correct(self, outputs: Outputs, batch: Mapping[str, Array]) -> int | None:
        """How many items of a labelled batch the model gets right; None where that is no question."""
        del outputs, batch
        return None

    def encode_all(self, records: Iterable[Record], max_length: int, *, training: bool) -> list[Example]:
        """Encode every record, giving the place of the one that cannot be.

        Raises:
            DataError: see `encode`.
        """
        examples = []
        for record in records:
            try:
                examples.append(self.encode(record, max_length, training=training))
            except UsageError as error:
                raise DataError(f"{record.where}: {error}") from error
        return examples

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
            batch.update(self._labels(examples, shape))
        return batch

    def _labels(self, examples: Sequence[Example], shape: tuple[int, int]) -> dict[str, Array]:
        if all(example.label is not None for example in examples):
            return {"labels": np.array([example.label for example in examples], np.int64)}
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
        if isinstance(value, str):
            ids, types = self.text.encode(value, max_length + 1)
            if len(ids) > max_length:
                ids, types = self.text.encode(value, max_length)
                return _row(record, field, ids, types), True
            return _row(record, field, ids, types), False
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
        if value is None:
            raise DataError(f"{record.where}: lacks the field {field!r}, it has {_names(record)}")
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise DataError(
                f"{record.where}: {field} is {_shown(value)}, expected a text or a list of token ids"
            )
        limit = self.manifest.model.vocab_size
        wrong = [item for item in value if not 0 <= item < limit]
        if wrong:
            raise DataError(
                f"{record.where}: {field} holds token {wrong[0]}, the vocabulary has {limit} tokens"
            )
        return list(value)

    def missing(self, record: Record, expected: str) -> DataError:
        """The error for a record of another shape than the task's."""
        return DataError(
            f"{record.where}: has the fields {_names(record)}, {self.manifest.task} needs {expected}"
        )


def _row(record: Record, field: str, ids: Sequence[int], types: Sequence[int]) -> Row:
    if not ids:
        raise DataError(f"{record.where}: {field} is empty, expected at least one token")
    return Row(np.array(ids, np.int32), np.array(types, np.int32))


def _names(record: Record) -> str:
    return ", ".join(repr(str(name)[:40]) for name in list(record.fields)[:8]) or "none"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
