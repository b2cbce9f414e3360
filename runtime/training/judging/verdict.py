"""Is an adapter better than what it started from, and than what knows nothing of the records?"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...tasks.targets import Targets
from .evaluate import Evaluation, Scores

FloatArray = npt.NDArray[np.float64]
ENOUGH = 10
"""Judged items from which on a classifier is compared with what says the same of every record."""
TEMPERATURES = tuple(2.0 ** (exponent / 4) for exponent in range(-12, 5))
"""Factors that a trained classifier's scores may be multiplied by."""
_Z = 1.96  # a normal value is above it once in 40 times


@dataclass(frozen=True)
class Judged:
    """A candidate for the new adapter.

    Attributes:
        name: what it is.
        loss: by which candidates are compared: the mean loss over the judged items, where classes that
            exclude each other count alike.
        evaluation: on the judged records.
    """

    name: str
    loss: float
    evaluation: Evaluation

    @property
    def figures(self) -> tuple[float, float | None, float]:
        """What `judged_earlier` makes the candidate of again, but for what it said."""
        return self.evaluation.loss, self.evaluation.accuracy, self.loss


def judged_earlier(name: str, figures: tuple[float, float | None, float]) -> Judged:
    """A candidate that was judged before, by an earlier process perhaps."""
    loss, accuracy, compared = figures
    return Judged(name, compared, Evaluation(loss, accuracy))


def judged(
    name: str, evaluation: Evaluation, targets: Targets | None, label_weights: FloatArray | None
) -> Judged:
    """A candidate; without targets or weights its loss is the evaluation's own."""
    loss, said = evaluation.loss, evaluation.said
    if said is not None and targets is not None and label_weights is not None and math.isfinite(loss):
        weights = targets.weight_of(said.targets, label_weights)
        loss = float(weights @ targets.losses(said.scores, said.targets) / weights.sum())
    return Judged(name, loss, evaluation)


def calibrate(
    evaluation: Evaluation, targets: Targets, label_weights: FloatArray
) -> tuple[float, Evaluation]:
    """The factor for a classifier's scores with which its loss is smallest, and the evaluation with it.

    A regression's is 1, as is that of scores that are no numbers. Source: temperature scaling (Guo et al.,
    2017, arXiv 1706.04599).
    """
    said = evaluation.said
    if said is None or targets.problem_type == "regression" or not math.isfinite(evaluation.loss):
        return 1.0, evaluation
    weights = targets.weight_of(said.targets, label_weights)
    scale = min(
        TEMPERATURES, key=lambda factor: float(weights @ targets.losses(factor * said.scores, said.targets))
    )
    scores = scale * said.scores
    loss = float(targets.losses(scores, said.targets).mean())
    return scale, Evaluation(loss, evaluation.accuracy, Scores(scores, said.targets))


@dataclass(frozen=True)
class Trivial:
    """The best that says the same of every record, beside a classifier.

    Attributes:
        loss, accuracy: on the judged items.
        is_beaten: whether the classifier's loss is smaller, by more than chance explains (a one-sided test of
            the differences item by item, wrong once in 40 times); None where there are too few items to tell.
    """

    loss: float
    accuracy: float | None
    is_beaten: bool | None


def trivial(said: Scores, targets: Targets, label_weights: FloatArray) -> Trivial:
    """What a classifier is compared with, made of the judged items' labels: as hard to beat as it gets."""
    weights = targets.weight_of(said.targets, label_weights)
    scores = np.tile(targets.constant(said.targets, weights), (len(weights), 1))
    losses = targets.losses(scores, said.targets)
    right = targets.correct(scores.astype(np.float32), targets.decoded(said.targets))
    better = losses - targets.losses(said.scores, said.targets)
    total, count = weights.sum(), len(weights)
    mean = float(weights @ better / total)
    beaten = None
    if count >= ENOUGH:
        spread = np.square(weights * (better - mean)).sum() * count / (count - 1)
        beaten = mean > _critical(count - 1) * math.sqrt(spread) / total
    return Trivial(float(losses.mean()), None if right is None else right / count, beaten)


def _critical(freedom: int) -> float:
    """Student's t to three digits, from five degrees of freedom on (Cornish and Fisher's expansion)."""
    z = _Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(accuracy: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`."""
    z2 = _Z**2 / count
    middle = (accuracy + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(accuracy * (1 - accuracy) / count + z2 / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def by_label(said: Scores, targets: Targets) -> dict[str, dict[str, Any]]:
    """Of each label that the judged items have: their number, and how many of them are right."""
    if targets.problem_type != "single_label_classification":
        return {}
    right = said.scores.argmax(axis=1) == said.targets.argmax(axis=1)
    return {
        name: {"items": int(of.sum()), "right": int(right[of].sum())}
        for index, name in enumerate(targets.names)
        if (of := said.targets[:, index] > 0).any()
    }


@dataclass(frozen=True)
class Outcome:
    """What became of an update.

    Attributes:
        before: the adapter that it started from.
        chosen: the best candidate.
        candidates: all of them.
        judged_by: how.
        trivial: what knows nothing of the records, beside a classifier.
        rejected: why the chosen one is not kept; None where it is.
        remedy: what to do about that.
    """

    before: Judged
    chosen: Judged
    candidates: list[Judged]
    judged_by: str
    trivial: Trivial | None
    rejected: str | None
    remedy: str = ""


def decide(
    before: Judged,
    candidates: list[Judged],
    targets: Targets | None,
    label_weights: FloatArray | None,
    *,
    judged_by: str,
    says_something: bool | None = None,
) -> Outcome:
    """Choose the best candidate, which is kept if it is no worse than `before` and, of a classifier, better
    than what says the same of every record.

    Args:
        before: what the update started from.
        candidates: judged on the same items, the chosen one with what it said.
        targets: of a classifier.
        label_weights: what its labels count.
        judged_by: how they were judged.
        says_something: whether a test says that the candidate is better than chance; None: test it here.
    """
    chosen = min(candidates, key=lambda item: math.inf if math.isnan(item.loss) else item.loss)
    said = chosen.evaluation.said
    floor = None
    if chosen.loss <= before.loss and said is not None and targets is not None and label_weights is not None:
        floor = trivial(said, targets, label_weights)
        if says_something is not None:
            floor = dataclasses.replace(floor, is_beaten=says_something)
    rejected, remedy = None, ""
    if not chosen.loss <= before.loss:
        where = judged_by.removesuffix(" records")
        rejected = f"{where} loss went from {before.loss:.4f} to {chosen.loss:.4f}"
        remedy = "use more data or steps, or a lower learning rate"
    elif floor is not None and floor.is_beaten is False:
        assert said is not None
        rejected = (
            f"what it learned does no better by {judged_by} ({len(said.targets)}) than saying the same of "
            f"every record (loss {chosen.evaluation.loss:.4f} and {floor.loss:.4f}"
        )
        if chosen.evaluation.accuracy is not None and floor.accuracy is not None:
            rejected += f", accuracy {chosen.evaluation.accuracy:.2f} and {floor.accuracy:.2f}"
        rejected += "), or not by more than chance explains"
        remedy = "check that the labels are right, and give more records of each"
    return Outcome(before, chosen, candidates, judged_by, floor, rejected, remedy)
