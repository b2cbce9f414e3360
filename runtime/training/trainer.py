"""The training loop: batches, rates and limits of every step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Strategy
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UpdateRejectedError

from ..memory.plan import NOTHING_HELD, Held
from ..tasks import Example, Task
from .batches import step_batches
from .options import TrainingOptions
from .sampling import Indices
from .state.buffers import TrainingState
from .state.checkpoint import Progress
from .steps.descent import GradientDescent, Stepper
from .steps.forward_only import ForwardOnly
from .steps.schedule import learning_rate
from .techniques.base import Steps

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """One finished step: its number from 1, of how many, its loss and the process's resident bytes after
    it."""

    number: int
    total: int
    loss: float
    resident_bytes: int


@dataclass(frozen=True)
class Schedule:
    """Everything that fixes what each step does; `classes` are those of the examples, if they have any, and
    `of_technique` is what the adapter's technique does, `dropout` the share of values that is dropped in
    front of each LoRA's `A`."""

    options: TrainingOptions
    total_steps: int
    max_relative_change: float | None
    classes: Indices | None
    of_technique: Steps
    dropout: float = 0.0


def train(
    bundle: Bundle,
    strategy: Strategy,
    task: Task,
    examples: Sequence[Example],
    constants: Mapping[str, FloatArray],
    state: TrainingState,
    progress: Progress,
    schedule: Schedule,
    after_step: Callable[[float], None],
    threads: int = 0,
    held: Held = NOTHING_HELD,
) -> None:
    """Train from `progress.step` to the schedule's end; `state` and `progress` are updated in place.

    Args:
        bundle: the bundle.
        strategy: how gradients are computed.
        task: makes batches of the examples.
        examples: what to train on.
        constants: all adapter inputs; those in `state` are taken from there.
        state: the trained tensors and moments.
        progress: where the update stands.
        schedule: what each step does.
        after_step: called with the loss after every step; may raise to stop.
        threads: threads of the training session.
        held: what a chain of stages holds to save time.

    Raises:
        UpdateRejectedError: the loss or a gradient is not a number any more, or what the technique changes
            is more than the policy allows.
    """
    options = schedule.options
    assert options.learning_rate is not None  # `with_defaults` has seen to it
    assert options.warmup_steps is not None
    stepper: Stepper
    if strategy.exact:
        stepper = GradientDescent(
            bundle,
            strategy,
            constants,
            state,
            options,
            schedule.of_technique,
            threads,
            held,
            schedule.dropout,
        )
    else:
        stepper = ForwardOnly(bundle, strategy, task, constants, state, options, threads)
    try:
        while progress.step < schedule.total_steps:
            batches = step_batches(task, examples, options, progress.step, schedule.classes)
            rate = learning_rate(
                options.schedule,
                options.learning_rate,
                progress.step,
                schedule.total_steps,
                options.warmup_steps,
            )
            loss, norm = stepper.step(batches, progress.step + 1, rate)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UpdateRejectedError(
                    f"step {progress.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}, "
                    "so the update is given up: lower the learning rate"
                )
            limit = schedule.max_relative_change
            if limit is not None and state.limit_change(limit):
                progress.limited_steps += 1
            changed = schedule.of_technique.after_step(progress.step + 1)
            if limit is not None and changed and (change := state.relative_change()) > limit:
                raise UpdateRejectedError(
                    f"step {progress.step + 1}: what the adapter's method takes out changes it by "
                    f"{change:.3g} of its norm, the bundle's policy allows {limit:g}: train a fresh adapter"
                )
            progress.step += 1
            progress.losses.append(loss)
            progress.learning_rates.append(rate)
            progress.grad_norms.append(norm)
            after_step(loss)
    finally:
        stepper.close()
