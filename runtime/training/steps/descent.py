"""A step along the gradient: micro-batches, their gradients added up, AdamW."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Strategy
from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES
from edgepeft.bundle.reader import Bundle

from ...inputs import has_drift_penalty
from ...memory.plan import NOTHING_HELD, Held
from ..batches import StepBatches
from ..gradients.drift import Drift
from ..gradients.strategies import Gradients, open_gradients
from ..options import TrainingOptions
from ..state.buffers import TrainingState
from ..techniques.base import Steps
from .dropout import Dropout
from .optimizer import AdamW, AdamWOptions
from .rates import rate_factors

FloatArray = npt.NDArray[np.float32]
Batch: TypeAlias = Mapping[str, npt.NDArray[np.generic]]

DEFAULT_DRIFT_WEIGHT = 0.1


class Stepper(Protocol):
    """Moves the parameters of a training state by one optimizer step."""

    def step(self, batches: StepBatches, number: int, learning_rate: float) -> tuple[float, float]:
        """The loss before the step `number` (from 1), and the norm of its gradient before clipping."""

    def close(self) -> None:
        """Free the sessions."""


class GradientDescent:
    """AdamW on the gradients of a strategy.

    Args:
        bundle: the bundle.
        strategy: how gradients are computed.
        constants: all adapter inputs; those in `state` are taken from there.
        state: the trained tensors and moments.
        options: of the update.
        of_technique: what the adapter's technique does beside.
        threads: threads of the training sessions.
        held: what a chain of stages holds to save time.
        dropout: the share of values that is dropped in front of each LoRA's `A`.
    """

    def __init__(
        self,
        bundle: Bundle,
        strategy: Strategy,
        constants: Mapping[str, FloatArray],
        state: TrainingState,
        options: TrainingOptions,
        of_technique: Steps,
        threads: int = 0,
        held: Held = NOTHING_HELD,
        dropout: float = 0.0,
    ) -> None:
        self._state = state
        self._of_technique = of_technique
        self._number, self._added = 0, 0.0
        self._drift: Drift | None = None
        with ExitStack() as opened:
            adamw = AdamWOptions(weight_decay=options.weight_decay, max_grad_norm=options.max_grad_norm)
            kept = OPTIMIZER_STATES[options.optimizer_state]
            self._optimizer = AdamW(bundle, state, adamw, kept, rate_factors(state.parameters, options))
            opened.callback(self._optimizer.close)
            if has_drift_penalty(bundle.manifest):
                weight = DEFAULT_DRIFT_WEIGHT if options.drift_weight is None else options.drift_weight
                self._drift = Drift(bundle, weight, threads)
                opened.callback(self._drift.close)
            self._dropout = Dropout(bundle.manifest, dropout, options.seed)
            take = self._take if state.passes_gradients else None
            self._gradients = open_gradients(bundle, strategy, constants, state, threads, held, take)
            opened.callback(self._gradients.close)
            self._opened = opened.pop_all()

    def step(self, batches: StepBatches, number: int, learning_rate: float) -> tuple[float, float]:
        """See `Stepper.step`."""
        self._dropout.begin(number)
        if self._state.passes_gradients:
            self._number, self._added = number, 0.0
            self._optimizer.begin(number, learning_rate)
            loss = accumulate(self._gradients, batches, self._state, self._added_to)
            return loss + self._added, self._optimizer.taken_norm
        loss = accumulate(self._gradients, batches, self._state, self._added_to)
        names = self._state.parameters.keys()
        loss += self._of_technique.before_update(names)
        norm = self._optimizer.step(number, learning_rate)
        self._of_technique.after_update(names, number, self._optimizer.clip_coef)
        return loss, norm

    def _added_to(self, batch: Batch) -> Batch:
        """A batch with what the training graph takes besides."""
        batch = self._dropout.added_to(batch)
        return batch if self._drift is None else self._drift.added_to(batch)

    def close(self) -> None:
        """Free the sessions."""
        self._opened.close()

    def _take(self, names: Collection[str]) -> None:
        """Update some parameters from their gradients and drop these."""
        self._added += self._of_technique.before_update(names)
        self._optimizer.take(names)
        self._of_technique.after_update(names, self._number, self._optimizer.clip_coef)
        self._state.drop_gradients(names)


def accumulate(
    gradients: Gradients,
    batches: StepBatches,
    state: TrainingState,
    added_to: Callable[[Batch], Batch] = lambda batch: batch,
) -> float:
    """The loss of micro-batches as one batch, whose gradient lands in `state`.

    Losses are means over what counts (a record, a labelled token), so a micro-batch has the weight of its
    items: the result is that of all records in one batch, whatever their lengths. Two losses are not such
    means: the contrastive one compares pairs within a micro-batch only, and the drift penalty, a mean over
    positions, is weighted by items too.

    Args:
        gradients: computes a micro-batch's gradient into `state`.
        batches: at least one.
        state: receives the gradient; for several micro-batches, one that `adds_up`.
        added_to: completes a batch, in their order.
    """
    if len(batches) == 1:
        (batch,) = batches
        return gradients.run(added_to(batch))
    grad, total = state.buffers["grad"], state.buffers["total"]
    items, loss = 0, 0.0
    for batch in batches:
        count = batches.task.items(batch)
        loss += count * gradients.run(added_to(batch))
        for start, stop in state.pieces():
            weighted = np.float32(count) * grad.read(start, stop)
            total.write(start, total.read(start, stop) + weighted if items else weighted)
        items += count
    for start, stop in state.pieces():
        grad.write(start, total.read(start, stop) / np.float32(items))
    return loss / items
