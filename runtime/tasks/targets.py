"""Labels of classifiers and regressions: from records, to batches, and back into results.

transformers' `problem_type` decides: one class of several (`label` by name or number), classes that do not
exclude each other (a list of names or numbers, or a 0 or 1 for each as floats), or a number for each output.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import DataError

from ..records import Record
from .examples import Array, Example, Label, shown

THRESHOLD = 0.5
"""Probability from which a class counts as predicted, where several may apply."""
MOST_NUMBER = 1e18
"""Largest number that can be learned: its square is a float32."""


class Targets:
    """What a bundle's labels are.

    As a target, a class is a 1 among 0s, classes that do not exclude each other are a 0 or 1 each, and
    numbers of a regression are themselves: float64 `[items, labels]`.

    Args:
        manifest: the bundle's manifest.
        balanced: classes that exclude each other count alike, however many records they have.
    """

    def __init__(self, manifest: Manifest, *, balanced: bool = True) -> None:
        self.balanced = balanced
        self.names = manifest.model.labels
        self.problem_type = manifest.model.problem_type or "single_label_classification"

    def parse(self, record: Record) -> Label:
        """The label of a record, or None where it has none.

        Raises:
            DataError: the label is of another kind, or was not known when the bundle was exported.
        """
        value = record.fields.get("label", record.fields.get("labels"))
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if value is None:
            return None
        if self.problem_type == "regression":
            return self._numbers(record, value if isinstance(value, list | tuple) else [value])
        if self.problem_type == "multi_label_classification":
            return self._several(record, value)
        return self.number(record, value)

    def number(self, record: Record, value: object) -> int:
        """A label's number, given its name or number.

        Raises:
            DataError: it was not known when the bundle was exported.
        """
        if isinstance(value, str):
            if value in self.names:
                return self.names.index(value)
        elif isinstance(value, int | np.integer) and not isinstance(value, bool):
            if 0 <= value < len(self.names):
                return int(value)
        else:
            raise DataError(f"{record.where}: label is {shown(value)}, expected a label's name or number")
        listed = ", ".join(self.names[:10]) + (", …" if len(self.names) > 10 else "")
        from difflib import get_close_matches  # for this message only

        near = get_close_matches(value, self.names, 1) if isinstance(value, str) else []
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"{record.where}: label {shown(value)} was not known when the bundle was exported{meant}; it "
            f"knows {len(self.names)}: {listed}. Use these, or export the model with --labels that name all"
        )

    def array(self, examples: Sequence[Example]) -> Array:
        """`labels` of a batch: int64 `[batch]`, or float32 `[batch, outputs]`."""
        single = self.problem_type == "single_label_classification"
        return np.array([example.label for example in examples], np.int64 if single else np.float32)

    def encoded(self, labels: Array) -> npt.NDArray[np.float64]:
        """The targets of a batch's labels."""
        if self.problem_type == "single_label_classification":
            found: npt.NDArray[np.float64] = np.eye(len(self.names))[labels.astype(np.int64)]
            return found
        return labels.astype(np.float64).reshape(len(labels), -1)

    def decoded(self, targets: npt.NDArray[np.float64]) -> Array:
        """The labels that `encoded` made targets of."""
        if self.problem_type == "single_label_classification":
            numbers: Array = targets.argmax(axis=1)
            return numbers
        return targets.astype(np.float32)

    def weights(self, targets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What a record of each class counts, by label, with a mean of 1 over the records; 1 where classes do
        not exclude each other, or count what they have."""
        if self.problem_type != "single_label_classification" or not self.balanced:
            return np.ones(len(self.names))
        counts = targets.sum(axis=0)
        present = np.count_nonzero(counts)
        found: npt.NDArray[np.float64] = len(targets) / (present * np.maximum(counts, 1.0))
        return found

    def weight_of(
        self, targets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """What each item counts, by the `weights` of the labels."""
        if self.problem_type != "single_label_classification":
            return np.ones(len(targets))
        found: npt.NDArray[np.float64] = targets @ weights
        return found

    def losses(
        self, scores: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """The loss of each item, as the loss graph has it of a batch of one: cross entropy, the mean binary
        cross entropy, or the mean squared error."""
        found: npt.NDArray[np.float64]
        if self.problem_type == "regression":
            found = np.square(scores - targets).mean(axis=1)
        elif self.problem_type == "multi_label_classification":
            found = (np.logaddexp(0, scores) - scores * targets).mean(axis=1)
        else:
            largest = scores.max(axis=1, keepdims=True)
            total = np.log(np.exp(scores - largest).sum(axis=1)) + largest[:, 0]
            found = total - (scores * targets).sum(axis=1)
        return found

    def constant(
        self, targets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """The scores `[labels]` of the best that says the same of every record.

        Args:
            targets: of the records it is made from.
            weights: of these.
        """
        mean: npt.NDArray[np.float64] = weights @ targets / weights.sum()
        if self.problem_type == "regression":
            return mean
        share = np.clip(mean, 1e-3, 1 - 1e-3)
        if self.problem_type == "multi_label_classification":
            return np.log(share) - np.log1p(-share)
        return np.log(share)

    def results(self, logits: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
        """What `predict` says of each row of logits `[batch, outputs]`."""
        wide = logits.astype(np.float64)
        if self.problem_type == "regression":
            return [{"values": dict(zip(self.names, row.tolist(), strict=True))} for row in wide]
        if self.problem_type == "multi_label_classification":
            return [self._applying(row) for row in _sigmoid(wide)]
        return [
            {
                "label": self.names[int(row.argmax())],
                "score": float(row.max()),
                "scores": dict(zip(self.names, row.tolist(), strict=True)),
            }
            for row in softmax(wide)
        ]

    def expected(self, label: Label) -> Any:
        """A record's label in the form of the results'."""
        if isinstance(label, int):
            return self.names[label]
        assert label is not None
        if self.problem_type == "regression":
            return dict(zip(self.names, label, strict=True))
        return [name for name, value in zip(self.names, label, strict=True) if value >= THRESHOLD]

    def correct(self, logits: npt.NDArray[np.float32], labels: Array) -> int | None:
        """Rows that are right, in every class where several may apply; None for a regression."""
        if self.problem_type == "regression":
            return None
        if self.problem_type == "multi_label_classification":
            applying = labels.astype(np.float32) >= THRESHOLD
            return int(((logits >= 0) == applying).all(axis=1).sum())
        return int((logits.argmax(axis=1) == labels).sum())

    def _applying(self, probabilities: npt.NDArray[np.float64]) -> dict[str, Any]:
        scores = dict(zip(self.names, probabilities.tolist(), strict=True))
        return {"labels": [name for name, score in scores.items() if score >= THRESHOLD], "scores": scores}

    def _several(self, record: Record, value: object) -> tuple[float, ...]:
        if not isinstance(value, list | tuple):
            raise DataError(
                f"{record.where}: label is {shown(value)}, expected a list of the labels that apply, by name "
                f"or number, or {len(self.names)} numbers such as 0.0 and 1.0"
            )
        if value and all(isinstance(item, float) for item in value):
            return self._numbers(record, value)
        applying = {self.number(record, item) for item in value}
        return tuple(float(index in applying) for index in range(len(self.names)))

    def _numbers(self, record: Record, value: Sequence[object]) -> tuple[float, ...]:
        numbers = [
            float(item)
            for item in value
            if isinstance(item, int | float | np.number)
            and not isinstance(item, bool)
            and -MOST_NUMBER <= item <= MOST_NUMBER
        ]
        if len(numbers) != len(value) or len(numbers) != len(self.names):
            raise DataError(
                f"{record.where}: label is {shown(value)}, expected {len(self.names)} finite numbers "
                f"({', '.join(self.names[:10])}) of at most {MOST_NUMBER:.0e}"
            )
        return tuple(numbers)


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return total


def _sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits))
    return result
