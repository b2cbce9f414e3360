"""Compare a bundle's chain of stages with its resident training graph, which was compared with PyTorch."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import VerificationError
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.state.buffers import TrainingState

#: Largest relative difference of the loss and of a gradient (its L2 norm): both add up in other orders.
STAGE_TOLERANCE = 1e-4
#: A gradient whose norm is below this is rounding.
SMALLEST_NORM = 1e-6


def is_rounding(name: str, gradients: Sequence[np.ndarray], largest: float) -> bool:
    """Whether gradients of a bias have no more than rounding, beside others whose largest norm is `largest`.

    A softmax does not see what a key's bias adds to all of its scores: that gradient is zero, and computed as
    a sum of terms that cancel.
    """
    floor = SMALLEST_NORM * max(1.0, largest)
    return name.endswith(".bias") and all(float(np.linalg.norm(value)) < floor for value in gradients)


def verify_stages(
    bundle: Bundle,
    batch: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: float = STAGE_TOLERANCE,
) -> float:
    """The largest relative difference between the chain's results and the training graph's.

    Args:
        bundle: with a partition.
        batch: the model's inputs and those of the loss.
        inputs: all adapter inputs.
        expected: `loss` and `grad.NAME` of the training graph on both.
        tolerance: largest relative difference of the loss and of a gradient.

    Raises:
        VerificationError: it is above the tolerance.
    """
    state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
    chain = Chain(bundle, {**inputs, **state.parameters})
    loss = chain.gradients(batch, state)
    chain.close()
    differences = {"loss": abs(loss - float(expected["loss"])) / max(1.0, abs(loss))}
    largest = max((float(np.linalg.norm(value)) for value in state.gradients.values()), default=1.0)
    for name, gradient in state.gradients.items():
        other = expected[f"grad.{name}"]
        if is_rounding(name, (gradient, other), largest):
            continue
        norm = max(float(np.linalg.norm(other)), SMALLEST_NORM)
        differences[f"the gradient of {name}"] = float(np.linalg.norm(gradient - other)) / norm
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= tolerance:
        raise VerificationError(
            f"{worst} differs by {differences[worst]:.2e} between the training graph and its stages, "
            f"tolerance {tolerance:.1e}: nothing was written"
        )
    return differences[worst]
