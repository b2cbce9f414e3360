"""What the tasks have in common: records to examples, examples to batches, outputs to results."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import DataError, UsageError

from ..adapters.virtual_tokens import Virtual
from ..records import Record
from ..text.tokenizer import TOKENIZER_FILE, Text
from .examples import Array, Example, NothingToLearnError, Outputs
from .targets import Targets

if TYPE_CHECKING:
    from ..text.chat import ChatTemplate


class Task(ABC):
    """Records in, batches and results out. The tokenizer is loaded when the first text is met.

    Attributes:
        virtual: tokens of an adapter that trains, which batches have in front of each text; else none.
    """

    field = "text"
    """Field of a record that holds what the model reads."""
    output: str
    """Name of the inference graph's output that holds the result."""
    rows_per_record = 1
    """Rows of a batch that one training record makes."""
    minimum_batch = 1
    """Records below which a batch has no gradient."""
    targets: Targets | None = None
    """What a classifier's labels are."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.virtual: Virtual | None = None
        self._text: Text | None = None
        self._chat: ChatTemplate | None = None
        names = {spec.name for spec in self.manifest.graphs["inference"].inputs}
        self._inputs = names - self.manifest.adapter_inputs.keys()

    @property
    def text(self) -> Text:
        """The bundle's tokenizer."""
        if self._text is None:
            self._text = Text(self.bundle)
        return self._text

    @property
    def has_text(self) -> bool:
        """Whether the bundle holds a tokenizer."""
        return TOKENIZER_FILE in self.manifest.files

    @property
    def chat(self) -> "ChatTemplate":
        """The bundle's chat template."""
        if self._chat is None:
            # Few records and prompts are conversations.
            from ..text.chat import ChatTemplate

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
            NothingToLearnError: with `training`, nothing of it counts in the loss.
            DataError: the record lacks a field or has one that cannot be used; the message says where it
                stands.
        """

    @abstractmethod
    def items(self, batch: Mapping[str, Array]) -> int:
        """Over how many items the loss graph averages this batch."""

    @abstractmethod
    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """What `predict` returns for each record of a batch."""

    def labelled(
        self, values: npt.NDArray[np.float32], batch: Mapping[str, Array]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]] | None:
        """What of a classifier's output has a label: rows `[items, width]`, and targets `[items, labels]` as
        `Targets` has them; None for other tasks."""
        del values, batch
        return None

    def know(self, labels: tuple[str, ...]) -> None:
        """Have a classifier's classes be these from now on: those of the adapter that is in use."""
        if self.targets is not None:
            self.targets.names = labels

    def label_count(self, examples: Sequence[Example]) -> int:
        """Labels that `labelled` finds in examples."""
        return len(examples)

    def correct(self, outputs: Outputs, batch: Mapping[str, Array]) -> int | None:
        """How many items of a labelled batch the model gets right; None where that is no question."""
        del outputs, batch
        return None

    @abstractmethod
    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """The graph's inputs of several examples; with `training`, their labels too."""

    def finish(self, result: dict[str, Any], example: Example) -> dict[str, Any]:
        """A result with what only its record knows, such as the label it was expected to get."""
        del example
        return result

    def encode_all(self, records: Iterable[Record], max_length: int, *, training: bool) -> list[Example]:
        """Encode every record, giving the place of the one that cannot be.

        Raises:
            DataError: see `encode`.
        """
        try:
            return [self.encode_record(record, max_length, training=training) for record in records]
        except NothingToLearnError as error:
            raise DataError(str(error)) from error

    def encode_record(self, record: Record, max_length: int, *, training: bool) -> Example:
        """`encode`, giving the record's place where its text cannot be read.

        Raises:
            NothingToLearnError: see `encode`.
            DataError: see `encode`.
        """
        try:
            return self.encode(record, max_length, training=training)
        except UsageError as error:
            raise DataError(f"{record.where}: {error}") from error

    def missing(self, record: Record, expected: str) -> DataError:
        """The error for a record of another shape than the task's."""
        return DataError(
            f"{record.where}: has the fields {field_names(record)}, {self.manifest.task} needs {expected}"
        )


def field_names(record: Record) -> str:
    """The names of a record's first fields, for messages."""
    return ", ".join(repr(str(name)[:40]) for name in list(record.fields)[:8]) or "none"
