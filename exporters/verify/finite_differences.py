"""Compare the gradients of a training graph with central differences of its own loss.

For every trainable tensor the derivative along one direction v, Σ v·grad, is compared with

    R(h) = (4 D(h) - D(2h)) / 3,   D(h) = (L(+h) - L(-h)) / 2h,

whose error is O(h⁴). v is the gradient weighted at random, element by element, plus a random direction, so
that a gradient that is wrong, incomplete or too large shows. h is halved until R settles or the rounding of
the loss, float32, outweighs what is gained; what R still changed by and that rounding are its own error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Largest relative difference between a directional derivative and its central difference, beyond the error
#: of the latter.
TOLERANCE = 5e-3
#: Relative error of a loss in float32.
LOSS_ERROR = 5e-7
#: Change of the loss that the first step aims at, relative to the loss, and the most that it moves a tensor.
AIM, LARGEST_STEP = 1e-2, 0.05
#: Halvings of the step at most, and the relative error at which they end.
HALVINGS, SETTLED = 8, 1e-3
#: A difference whose error is above this part of it tells nothing.
RESOLVED = 0.05
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
        """Their difference, beyond the error of the central one, relative to the larger."""
        beyond = max(abs(self.derivative - self.central) - self.error, 0.0)
        return beyond / max(abs(self.derivative), abs(self.central), 1e-12)

    @property
    def resolved(self) -> bool:
        """Whether the central difference is precise enough to tell right from wrong."""
        return self.error <= RESOLVED * max(abs(self.derivative), abs(self.central))


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

    def slope(step: float) -> float:
        high, low = (
            loss({name: (values[name] + way * step * direction[name]).astype(np.float32) for name in names})
            for way in (1, -1)
        )
        return (high - low) / (2 * step)

    step = min(AIM * scale / max(abs(derivative), 1e-12), LARGEST_STEP)
    wide, last = slope(2 * step), None
    best, error = 0.0, float("inf")
    for _ in range(HALVINGS):
        near = slope(step)
        refined = (4 * near - wide) / 3
        # Two losses weighted 4/3 and two weighted 1/6, over the step.
        rounding = 1.5 * LOSS_ERROR * scale / step
        if last is not None and abs(refined - last) + rounding < error:
            best, error = refined, abs(refined - last) + rounding
        if error <= SETTLED * abs(best) or rounding > error:
            break
        wide, last, step = near, refined, step / 2
    return Difference(tuple(names), derivative, best, error)


def _direction(value: np.ndarray, gradient: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of the norm of `value`, float64: a step of 1 doubles the tensor."""
    along = gradient.astype(np.float64) * rng.uniform(0.5, 1.5, gradient.shape)
    across = rng.standard_normal(gradient.shape)
    size = float(np.linalg.norm(along))
    mixed = across / np.linalg.norm(across) + (along / size if size else 0.0)
    length = max(float(np.linalg.norm(value)), 1e-3)
    scaled: np.ndarray = mixed * (length / np.linalg.norm(mixed))
    return scaled
