"""The head of a classifier in closed form: one forward pass over the records, then a ridge regression."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import FEATURES, LinearHead, Manifest

from ...inputs import has_drift_penalty
from ...tasks import Example, Task
from ...tasks.targets import Targets
from ..judging.evaluate import Evaluation, Scores
from .remembered import balanced_sample, most_records
from .ridge import SCALES, Fit, Ridge

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]

# Chosen on ten sets of texts of 4 to 60 records a class, 12 draws of each: docs/decisions/classifier_head.md.
_LEAST_PENALTY = 1.0


def trained_head(manifest: Manifest, names: Sequence[str]) -> LinearHead | None:
    """The bundle's linear head, if all of it is among the tensors that train and may be replaced at once.

    Where the policy bounds how far an update may go, or a drift penalty is to hold it back, it may not.
    """
    head = manifest.linear_head
    if head is None or manifest.policy.max_relative_change is not None or has_drift_penalty(manifest):
        return None
    return head if set(head.inputs) <= set(names) else None


class ClosedForm:
    """Gathers features of a classifier's records, batch by batch, and fits its head to them.

    Args:
        task: a classifier's.
        targets: its labels.
        label_weights: what a record of each counts.
        count: labels of the records that it will be given.
        width: of the features.
        seed: see `Ridge`.
        has_bias: whether the head has one.
        held: features of records of other labels, `[records, width]` by label; see `remembered`.
    """

    def __init__(
        self,
        task: Task,
        targets: Targets,
        label_weights: npt.NDArray[np.float64],
        count: int,
        width: int,
        seed: int,
        has_bias: bool,
        held: Mapping[str, FloatArray] = MappingProxyType({}),
    ) -> None:
        self._task, self._targets, self._label_weights = task, targets, label_weights
        count += sum(len(rows) for rows in held.values())
        self._offset = 0.5 if targets.problem_type == "multi_label_classification" else 0.0
        self._origin = None
        if not has_bias:  # a probability that all labels share makes no difference between them
            single = targets.problem_type == "single_label_classification"
            self._origin = 1 / len(targets.names) if single else self._offset
        self._ridge = Ridge(width, len(targets.names), count, seed, self._origin)
        self._held: list[tuple[FloatArray, npt.NDArray[np.float64]]] = []
        for name, rows in held.items():
            encoded = targets.encoded(np.full(len(rows), targets.names.index(name), np.int64))
            self._held.append((rows, encoded))
            self._ridge.add(rows, encoded, targets.weight_of(encoded, label_weights))
        regression = targets.problem_type == "regression"
        self._scales = (1.0,) if regression else SCALES
        # Of few records, those that are left out say too little to tell a small penalty from a large one.
        self._least = 0.0 if regression else _LEAST_PENALTY

    def take(self, outputs: Mapping[str, FloatArray], batch: Mapping[str, Array]) -> None:
        """Count a batch in."""
        found = self._task.labelled(outputs[FEATURES], batch)
        assert found is not None
        rows, targets = found
        self._ridge.add(rows, targets, self._targets.weight_of(targets, self._label_weights))

    def fit(self) -> Fit:
        """The head that does best on records that it was not fitted to."""
        return self._ridge.fit(self._targets.losses, self._scales, self._offset, self._least)

    def with_held(self, given: Evaluation) -> Evaluation:
        """What the start says of the records, and of those that only their features are there of.

        It was fitted to the latter, so each is judged by a head that was fitted to the others of them.
        """
        if not self._held or given.said is None:
            return given
        count = sum(len(rows) for rows, _ in self._held)
        width, outputs = self._held[0][0].shape[1], len(self._targets.names)
        alone = Ridge(width, outputs, count, origin=self._origin)
        for rows, encoded in self._held:
            alone.add(rows, encoded, self._targets.weight_of(encoded, self._label_weights))
        fit = alone.fit(self._targets.losses, self._scales, self._offset, self._least)
        scores, targets = (fit.left_out, given.said.scores), (fit.targets, given.said.targets)
        return self._evaluation(Scores(np.concatenate(scores), np.concatenate(targets)))

    def features(self) -> dict[str, FloatArray]:
        """Those of the records, or of a sample where they are many, by label; none where there are no labels
        that exclude each other."""
        if self._targets.problem_type != "single_label_classification":
            return {}
        rows, targets = self._ridge.kept
        labels = targets.argmax(axis=1)
        chosen = balanced_sample(labels, most_records(rows.shape[1]), seed=0)
        rows, labels = rows[chosen], labels[chosen]
        return {name: rows[labels == index] for index, name in enumerate(self._targets.names)}

    def says_something(self, fit: Fit) -> bool:
        """Whether a fit is better than those to shuffled labels; all records must have been kept."""
        return self._ridge.beats_shuffled(
            fit.loss, self._targets.losses, self._scales, self._offset, self._least
        )

    def evaluation(self, fit: Fit) -> Evaluation:
        """The fit, judged on its own records, each by a head that was fitted without it."""
        return self._evaluation(Scores(fit.left_out, fit.targets))

    def _evaluation(self, said: Scores) -> Evaluation:
        targets = self._targets
        right = targets.correct(said.scores.astype(np.float32), targets.decoded(said.targets))
        return Evaluation(
            loss=float(targets.losses(said.scores, said.targets).mean()),
            accuracy=None if right is None else right / len(said.targets),
            said=said,
        )


def label_weights(
    targets: Targets, examples: Sequence[Example], held: Mapping[str, FloatArray] = MappingProxyType({})
) -> npt.NDArray[np.float64]:
    """What a record of each label counts, those that are `held` among them; see `Targets.weights`."""
    if not targets.balanced or targets.problem_type != "single_label_classification":
        return np.ones(len(targets.names))
    labels = [example.label for example in examples]
    for name, rows in held.items():
        labels += [targets.names.index(name)] * len(rows)
    return targets.weights(targets.encoded(np.array(labels, np.int64)))
