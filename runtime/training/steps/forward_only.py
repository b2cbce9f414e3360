"""Training by forward passes alone: the slope of the loss along a random direction stands for the gradient.

Simultaneous perturbation (SPSA) in the memory of inference, as MeZO does it (Malladi et al., arXiv
2305.17333): the loss is computed at `θ + εz` and at `θ - εz`, and `g = (above - below) / 2ε` times `z` is
what plain gradient descent follows. `E[g z]` is the gradient up to `O(ε²)`, but one `z` of `d` numbers tells
one number of it, so many more steps are needed than with gradients.

`z` is never stored: its numbers are drawn anew from (seed, step, tensor), a piece at a time, wherever they
are added. There is no gradient and nothing that an optimizer keeps.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Strategy
from edgepeft.bundle.reader import Bundle

from ...memory.planner import CHUNK_VALUES
from ...tasks import Task
from ..batches import StepBatches
from ..judging.evaluate import open_judge
from ..options import TrainingOptions
from ..state.buffers import TrainingState

FloatArray = npt.NDArray[np.float32]

EPSILON = 1e-3
"""How far the loss is probed, in standard deviations of `z`: MeZO's value."""


class ForwardOnly:
    """Gradient descent along random directions.

    The slope along `z` is on average as large as the gradient's norm (`E[g²] = ‖∇L‖²`), so it is what
    `max_grad_norm` clips. The weight decay is AdamW's.

    Args:
        bundle: the bundle.
        strategy: decides which forward graphs run.
        task: makes the batches.
        constants: all adapter inputs; those in `state` are taken from there.
        state: the trained tensors.
        options: of the update.
        threads: threads of a session.
    """

    def __init__(
        self,
        bundle: Bundle,
        strategy: Strategy,
        task: Task,
        constants: Mapping[str, FloatArray],
        state: TrainingState,
        options: TrainingOptions,
        threads: int = 0,
    ) -> None:
        self._state = state
        self._options = options
        self._judge = open_judge(bundle, task, state.inputs(constants), strategy, threads)

    def step(self, batches: StepBatches, number: int, learning_rate: float) -> tuple[float, float]:
        """See `Stepper.step`: the loss is the mean of both, the norm the slope's magnitude."""
        parameters, options = self._state.parameters, self._options
        perturb(parameters, options.seed, number, EPSILON)
        above = self._loss(batches)
        perturb(parameters, options.seed, number, -2 * EPSILON)
        below = self._loss(batches)
        slope = (above - below) / (2 * EPSILON)
        limit = options.max_grad_norm
        clip = min(1.0, limit / (abs(slope) + 1e-6)) if limit else 1.0
        # Back to θ, decay and update in one go.
        decayed = 1 - learning_rate * options.weight_decay
        for parameter in parameters.values():
            parameter *= np.float32(decayed)
        perturb(parameters, options.seed, number, decayed * EPSILON - learning_rate * clip * slope)
        return (above + below) / 2, abs(slope)

    def close(self) -> None:
        """Free the sessions."""
        self._judge.close()

    def _loss(self, batches: StepBatches) -> float:
        """The mean over all items of the step's batches."""
        total, items = 0.0, 0
        for batch in batches:
            count = batches.task.items(batch)
            total += count * self._judge.run(batch)[0]
            items += count
        return total / items


def perturb(parameters: Mapping[str, FloatArray], seed: int, step: int, scale: float) -> None:
    """Add `scale` times the `z` of a step to tensors, in place.

    `z` is standard normal: tensor `i`, in the mapping's order, takes its numbers from
    `Philox(key=seed, counter=[0, 0, i, step])`.
    """
    if not math.isfinite(scale):
        return  # the update is about to be given up, and says why
    for index, parameter in enumerate(parameters.values()):
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, step]))
        flat = parameter.reshape(-1)
        for start in range(0, len(flat), CHUNK_VALUES):
            piece = flat[start : start + CHUNK_VALUES]
            z = generator.standard_normal(len(piece), np.float32)
            z *= np.float32(scale)
            piece += z
