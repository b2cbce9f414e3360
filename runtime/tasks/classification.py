"""Classification: a record's input, whatever it is, to classes or numbers; and that of texts."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle

from ..records import Record
from .base import Task
from .examples import Array, Example, Outputs
from .targets import Targets
from .tokens import TokenTask


class Classifier(Task):
    """One label a record; what it is labelled is the subclasses' business."""

    output = "logits"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.targets: Targets = Targets(self.manifest)

    @abstractmethod
    def read(self, record: Record, max_length: int) -> Example:
        """The input of a record, without its label.

        Raises:
            DataError: the record lacks it, or it cannot be used.
        """

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`; a label is kept where there is one, and required for training."""
        example = self.read(record, max_length)
        label = self.targets.parse(record)
        if training and label is None:
            raise self.missing(record, 'a "label" to learn')
        return Example(example.rows, label, example.truncated, example.values)

    def items(self, batch: Mapping[str, Array]) -> int:
        """Rows."""
        return len(next(iter(batch.values())))

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """`{"label", "score", "scores"}`, `{"labels", "scores"}` where several may apply, or `{"values"}`."""
        del batch
        return self.targets.results(outputs[self.output])

    def finish(self, result: dict[str, Any], example: Example) -> dict[str, Any]:
        """With `expected`, where the record has a label."""
        if example.label is not None:
            result["expected"] = self.targets.expected(example.label)
        return result

    def labelled(
        self, values: npt.NDArray[np.float32], batch: Mapping[str, Array]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Every row."""
        return values, self.targets.encoded(batch["labels"])

    def correct(self, outputs: Outputs, batch: Mapping[str, Array]) -> int | None:
        """Rows that got their label."""
        return self.targets.correct(outputs[self.output], batch["labels"])


class TextClassification(Classifier, TokenTask):
    """`{"text", "label"}`, with a `text_pair` where two texts are one input, or `input_ids` instead."""

    takes_pairs = True

    def read(self, record: Record, max_length: int) -> Example:
        """See `Classifier.read`."""
        field = "text" if "text" in record.fields else "input_ids"
        if field not in record.fields:
            raise self.missing(record, '{"text", "label"} (or "input_ids" instead of "text")')
        row, truncated = self.tokens(record, field, max_length)
        return Example((row,), truncated=truncated)

    def labels(self, examples: Sequence[Example], shape: tuple[int, int]) -> dict[str, Array]:
        """See `TokenTask.labels`."""
        del shape
        return {"labels": self.targets.array(examples)}
