"""LoRA+: tensors with learning rates of their own, as multiples of the update's.

`B`, and whatever else has one axis (biases, magnitudes), learns at `ratio` times the rate of `A` and of the
matrices that are replaced whole.

Source: arXiv 2402.12354; `peft.optimizers.create_loraplus_optimizer`.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.errors import UsageError

from ..options import TrainingOptions

EMBEDDING_RATE = 1e-6
"""Peak rate of a LoRA on an embedding: PEFT's `loraplus_lr_embedding`."""


def rate_factors(
    parameters: Mapping[str, npt.NDArray[np.float32]], options: TrainingOptions
) -> dict[str, float]:
    """By name, what the update's rate is multiplied by for a trained tensor, where that is not 1.

    Raises:
        UsageError: LoRA+ is asked for, and none of them is a LoRA's `B`.
    """
    ratio = options.lora_plus_ratio
    if ratio is None:
        return {}
    if not any("lora_B" in name for name in parameters):
        raise UsageError(f"lora_plus_ratio is {ratio:g}, but nothing that trains is a LoRA's B: leave it out")
    assert options.learning_rate is not None  # `with_defaults` has seen to it
    factors = {name: ratio for name, value in parameters.items() if "lora_B" in name or value.ndim == 1}
    if options.learning_rate:
        factors |= {
            name: EMBEDDING_RATE / options.learning_rate for name in parameters if ".lora_embedding_" in name
        }
    return factors
