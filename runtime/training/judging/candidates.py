"""An update's candidates, judged: what it starts from, a head in closed form, and what is trained."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...tasks import Example, Task
from ..examples import Part
from ..head.closed_form import ClosedForm, label_weights
from ..head.remembered import balanced_sample, most_records
from ..head.ridge import Fit
from ..preparation import Prepared
from .evaluate import Evaluation, Sink
from .verdict import ENOUGH, Judged, Outcome, calibrate, decide, judged, judged_earlier

FROM, CLOSED_FORM, TRAINED = "start", "closed-form head", "trained"
"""Names of candidates."""
FEW_TO_SHUFFLE = 1000
"""Records below which a head in closed form is compared with heads that are fitted to shuffled labels."""


class Judge(Protocol):
    """Evaluates the adapter as it is now."""

    def __call__(self, examples: Sequence[Example], sink: Sink | None = None) -> Evaluation:
        """Loss and accuracy on examples; `sink` is given every batch."""


class Judging:
    """Judges the candidates of one update, and leaves the state as that of the best.

    Args:
        task: of the records.
        prepared: the update.
        judge: evaluates the state.
    """

    def __init__(self, task: Task, prepared: Prepared, judge: Judge) -> None:
        self._task, self._prepared, self._judge = task, prepared, judge
        self._targets = task.targets
        self._weights = None
        if self._targets is not None:
            self._weights = label_weights(self._targets, prepared.train_on, prepared.held)
        self._closed: ClosedForm | None = None

    def fit_head_alone(self) -> Outcome:
        """A classifier's head in closed form, each record judged by a head that was fitted without it."""
        train_on = self._prepared.train_on
        self._closed, given, fit = self._fit_head(train_on)
        return decide(
            self._judged(FROM, self._closed.with_held(given)),
            [self._judged(CLOSED_FORM, self._closed.evaluation(fit))],
            self._targets,
            self._weights,
            judged_by="leave-one-out",
            says_something=_says_something(self._closed, fit, len(train_on)),
        )

    def begin(self) -> None:
        """Judge what there is before the first step, and let training start from a head in closed form if it
        is better."""
        progress, held_out = self._prepared.progress, self._prepared.held_out
        if progress.held_out_before is None:
            progress.held_out_before = self._judged(FROM, self._judge(held_out)).figures
        head, state = self._prepared.head, self._prepared.state
        if head is None or progress.step:
            return
        present = {name: state.parameters[name].copy() for name in head.inputs}
        train_on = self._prepared.train_on
        closed, _, fit = self._fit_head(train_on)
        progress.head_says_something = _says_something(closed, fit, len(train_on))
        fitted = self._judged(CLOSED_FORM, self._judge(held_out))
        if fitted.loss <= judged_earlier(FROM, progress.held_out_before).loss:
            progress.held_out_head = fitted.figures
            return
        for name, values in present.items():
            state.restart(name, values)

    def end(self) -> Outcome:
        """Judge what was trained, and choose.

        Where a head in closed form is better, or training cannot be told from chance, the head is fitted once
        more, to the held-out records too. One test against shuffled labels says whether a head is better
        than chance, and what was trained from it where the held-out records are too few to tell.
        """
        progress, held_out = self._prepared.progress, self._prepared.held_out
        assert progress.held_out_before is not None
        before = judged_earlier(FROM, progress.held_out_before)
        candidates = [self._judged(TRAINED, self._calibrated(self._judge(held_out)))]
        said = candidates[0].evaluation.said
        too_few = said is not None and len(said.targets) < ENOUGH
        tested = progress.head_says_something if too_few else None
        if progress.held_out_head is None:
            return self._decided(before, candidates, tested)
        fitted = judged_earlier(CLOSED_FORM, progress.held_out_head)
        outcome = self._decided(before, [*candidates, fitted], tested)
        if outcome.chosen is candidates[0] and outcome.rejected is None:
            return outcome
        self._prepared.state.return_to_start()
        fitted = self._judged(CLOSED_FORM, self._judge(held_out))
        self._closed, _, _ = self._fit_head(self._prepared.examples)
        outcome = self._decided(before, [fitted], progress.head_says_something)
        return dataclasses.replace(outcome, candidates=[*candidates, fitted])

    def _decided(
        self, before: Judged, candidates: list[Judged], says_something: bool | None = None
    ) -> Outcome:
        return decide(
            before,
            candidates,
            self._targets,
            self._weights,
            judged_by="held-out records",
            says_something=says_something,
        )

    def features(self) -> dict[str, npt.NDArray[np.float32]]:
        """What the adapter keeps of the records, as it is now: their features, by label; see `remembered`."""
        head, train_on = self._prepared.head, self._prepared.train_on
        classes = self._prepared.classes
        if head is None or classes is None:
            return {}
        if self._closed is None:
            most = most_records(self._prepared.state.parameters[head.weight].shape[1])
            chosen = balanced_sample(classes, most, self._prepared.options.seed)
            self._closed, _ = self._gathered(Part(train_on, chosen))
        return self._closed.features()

    def _calibrated(self, trained: Evaluation) -> Evaluation:
        """Have a trained classifier be as sure of itself as the held-out records allow: as a rule it is too
        sure, having seen its own records again and again."""
        head, state = self._prepared.head, self._prepared.state
        if head is None or self._targets is None or self._weights is None:
            return trained
        scale, calibrated = calibrate(trained, self._targets, self._weights)
        for name in head.inputs:
            state.replace(name, np.float32(scale) * state.parameters[name])
        return calibrated

    def _fit_head(self, examples: Sequence[Example]) -> tuple[ClosedForm, Evaluation, Fit]:
        """Fit the head to examples and put it in place; beside it, what the adapter said of them before."""
        closed, given = self._gathered(examples)
        fit = closed.fit()
        self._put_head(fit)
        return closed, given, fit

    def _gathered(self, examples: Sequence[Example]) -> tuple[ClosedForm, Evaluation]:
        """The features of examples, and what the adapter says of them."""
        prepared = self._prepared
        assert prepared.head is not None
        assert self._targets is not None
        width = prepared.state.parameters[prepared.head.weight].shape[1]
        count = self._task.label_count(examples)
        seed, held = prepared.options.seed, prepared.held
        weights = label_weights(self._targets, examples, held)
        has_bias = prepared.head.bias is not None
        closed = ClosedForm(self._task, self._targets, weights, count, width, seed, has_bias, held)
        return closed, self._judge(examples, closed.take)

    def _put_head(self, fit: Fit) -> None:
        head, state = self._prepared.head, self._prepared.state
        assert head is not None
        state.restart(head.weight, fit.weight)
        if head.bias is not None:
            state.restart(head.bias, fit.bias)

    def _judged(self, name: str, evaluation: Evaluation) -> Judged:
        return judged(name, evaluation, self._targets, self._weights)


def _says_something(closed: ClosedForm, fit: Fit, count: int) -> bool | None:
    """Whether a head beats those to shuffled labels; None where there are too many records to try."""
    return closed.says_something(fit) if count < FEW_TO_SHUFFLE else None
