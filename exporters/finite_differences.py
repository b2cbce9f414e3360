"""Compare the gradients of a training graph with central differences of its own loss.

For every trainable tensor the derivative along one direction v is compared: Σ v·grad with

    (8 (L(+h) - L(-h)) - (L(+2h) - L(-2h))) / 12h,

whose error is O(h⁴). v is the gradient weighted at random, element by element, plus a random direction, so
that a gradient that is wrong, incomplete or too large shows. The loss is computed in float32, with an error
of about `LOSS_ERROR`; h is as large as makes that small beside the difference, and no larger than a part of
the tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Largest relative difference between a directional derivative and its central difference.
TOLERANCE = 5e-3
#: Relative error of a loss in float32, of which a difference of losses is made.
LOSS_ERROR = 5e-7
#: Change of the loss that a step aims at, relative to the loss, and the most that it moves a tensor.
AIM, LARGEST_STEP = 1e-2, 0.03
#: Directions at most; where there are more tensors, several of them share a direction.
DIRECTIONS = 128

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """One direction: the tensors moved, the derivative, its central difference and that one's error."""

    names: tuple[str, ...]
    derivative: float
    central: float
    error: float

    @property
    def relative(self) -> float:
        """Their difference, beyond the error of the losses, relative to the derivative."""
        beyond = max(abs(self.derivative - self.central) - self.error, 0.0)
        return beyond / max(abs(self.derivative), abs(self.central), 1e-12)

    @property
    def resolved(self) -> bool:
        """Whether the derivative stands out from the error of the losses."""
        return self.error < 0.1 * abs(self.derivative)


def compare(
    loss: Callable[[Mapping[str, np.ndarray]], float], values: Arrays, gradients: Arrays, seed: int = 0
) -> list[Difference]:
    """The directional derivatives of `loss` at `values`, by the gradients and by differences.

    Args:
        loss: the loss with some of the tensors replaced.
        values: the trainable tensors, float32, by name.
        gradients: of the same names and shapes.
        seed: draws the directions.
    """
    rng = np.random.default_rng(seed)
    names = sorted(values)
    rng.shuffle(names)
    count = min(len(names), DIRECTIONS)
    scale = max(1.0, abs(loss({})))
    return [
        _difference(loss, values, gradients, tuple(names[start::count]), rng, scale) for start in range(count)
    ]


def _difference(
    loss: Callable[[Mapping[str, np.ndarray]], float],
    values: Arrays,
    gradients: Arrays,
    names: Sequence[str],
    rng: np.random.Generator,
    scale: float,
) -> Difference:
    direction = {name: _direction(values[name], gradients[name], rng) for name in names}
    derivative = float(sum((direction[name] * gradients[name]).sum() for name in names))
    step = min(AIM * scale / max(abs(derivative), 1e-12), LARGEST_STEP)

    def at(distance: float) -> float:
        return loss({name: (values[name] + distance * direction[name]).astype(np.float32) for name in names})

    near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
    # Four losses, weighted 8, 8, 1 and 1, each off by at most LOSS_ERROR.
    error = 18 / 12 * LOSS_ERROR * scale / step
    return Difference(tuple(names), derivative, (8 * near - far) / (12 * step), error)


def _direction(value: np.ndarray, gradient: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of the norm of `value`, float64: a step of 1 doubles the tensor."""
    along = gradient.astype(np.float64) * rng.uniform(0.5, 1.5, gradient.shape)
    across = rng.standard_normal(gradient.shape)
    size = float(np.linalg.norm(along))
    mixed = across / np.linalg.norm(across) + (along / size if size else 0.0)
    length = max(float(np.linalg.norm(value)), 1e-3)
    scaled: np.ndarray = mixed * (length / np.linalg.norm(mixed))
    return scaled
