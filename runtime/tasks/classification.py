"""Sequence classification: `{"text", "label"}`, with the label by name or by number."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgepeft.errors import DataError
from edgepeft.runtime.data import Record
from edgepeft.runtime.tasks.base import Array, Example, Outputs, Task


class Classification(Task):
    """Records to classes."""

    output = "logits"

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`; a label is kept where there is one, and required for training."""
        field = "text" if "text" in record.fields else "input_ids"
        if field not in record.fields:
            raise self.missing(record, '{"text", "label"} (or "input_ids" instead of "text")')
        row, truncated = self.tokens(record, field, max_length)
        label = self._label(record)
        if training and label is None:
            raise self.missing(record, 'a "label" to learn')
        return Example((row,), label, truncated)

    def items(self, batch: Mapping[str, Array]) -> int:
        """Rows."""
        return int(batch["input_ids"].shape[0])

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """The best label of each row, its probability and all probabilities by label."""
        del batch
        logits = outputs[self.output].astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        labels = self.manifest.model.labels
        return [
            {
                "label": labels[int(row.argmax())],
                "score": float(row.max()),
                "scores": dict(zip(labels, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]

    def correct(self, outputs: Outputs, batch: Mapping[str, Array]) -> int | None:
        """Rows whose best class is their label."""
        return int((outputs[self.output].argmax(axis=1) == batch["labels"]).sum())

    def _label(self, record: Record) -> int | None:
        value = record.fields.get("label", record.fields.get("labels"))
        known = self.manifest.model.labels
        if value is None:
            return None
        if isinstance(value, str):
            if value in known:
                return known.index(value)
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            if 0 <= value < len(known):
                return int(value)
        else:
            raise DataError(f"{record.where}: label is {value!r}, expected a label's name or number")
        listed = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
        raise DataError(
            f"{record.where}: label {value!r} was not known when the bundle was exported; it knows "
            f"{len(known)}: {listed}"
        )
