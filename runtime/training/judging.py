"""An update's candidates, judged: what it starts from, a head in closed form, and what is trained."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edgepeft.runtime.tasks import Example, Task
from edgepeft.runtime.training.closed_form import ClosedForm, label_weights
from edgepeft.runtime.training.gate import Evaluation, Sink
from edgepeft.runtime.training.preparation import Prepared
from edgepeft.runtime.training.ridge import Fit
from edgepeft.runtime.training.verdict import Judged, Outcome, calibrate, decide, judged, judged_earlier

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
            self._weights = label_weights(self._targets, prepared.train_on)

    def fit_head_alone(self) -> Outcome:
        """A classifier's head in closed form, each record judged by a head that was fitted without it."""
        closed = self._closed_form()
        before = self._judged(FROM, self._judge(self._prepared.train_on, closed.take))
        fit = closed.fit()
        self._put_head(fit)
        few = len(self._prepared.train_on) < FEW_TO_SHUFFLE
        return decide(
            before,
            [self._judged(CLOSED_FORM, closed.evaluation(fit))],
            self._targets,
            self._weights,
            judged_by="leave-one-out",
            says_something=closed.says_something(fit) if few else None,
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
        closed = self._closed_form()
        self._judge(self._prepared.train_on, closed.take)
        self._put_head(closed.fit())
        fitted = self._judged(CLOSED_FORM, self._judge(held_out))
        if fitted.loss <= judged_earlier(FROM, progress.held_out_before).loss:
            progress.held_out_head = fitted.figures
            return
        for name, values in present.items():
            state.restart(name, values)

    def end(self) -> Outcome:
        """Judge what was trained, and choose."""
        progress, held_out = self._prepared.progress, self._prepared.held_out
        assert progress.held_out_before is not None
        candidates = [self._judged(TRAINED, self._calibrated(self._judge(held_out)))]
        if progress.held_out_head is not None:
            fitted = judged_earlier(CLOSED_FORM, progress.held_out_head)
            if not candidates[0].loss <= fitted.loss:
                self._prepared.state.return_to_start()
                fitted = self._judged(CLOSED_FORM, self._judge(held_out))
            candidates.append(fitted)
        before = judged_earlier(FROM, progress.held_out_before)
        return decide(before, candidates, self._targets, self._weights, judged_by="held-out records")

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

    def _closed_form(self) -> ClosedForm:
        prepared = self._prepared
        assert prepared.head is not None
        assert self._targets is not None
        assert self._weights is not None
        width = prepared.state.parameters[prepared.head.weight].shape[1]
        count = self._task.label_count(prepared.train_on)
        return ClosedForm(self._task, self._targets, self._weights, count, width, prepared.options.seed)

    def _put_head(self, fit: Fit) -> None:
        head, state = self._prepared.head, self._prepared.state
        assert head is not None
        state.restart(head.weight, fit.weight)
        if head.bias is not None:
            state.restart(head.bias, fit.bias)

    def _judged(self, name: str, evaluation: Evaluation) -> Judged:
        return judged(name, evaluation, self._targets, self._weights)
