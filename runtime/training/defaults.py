"""What an update does where it is not told: by task and number of records.

The figures were chosen on real texts; docs/learning.md has them, and those on texts that chose nothing.
"""

import dataclasses
import math

from edgepeft.bundle.manifest import Manifest

from .options import TrainingOptions
from .sampling import steps_per_epoch

FEW = 20
"""Records below which a classifier learns its head in closed form and nothing else: held-out records would be
one or two."""
RATE = 1e-3
STEPS, GENERATION_STEPS = 120, 60
"""Steps that an update takes at least, if `MOST_EPOCHS` are enough for so many."""
LEAST_EPOCHS, MOST_EPOCHS = 2, 10
_GENERATION = ("text-generation", "text2text-generation", "fill-mask")


def with_defaults(options: TrainingOptions, manifest: Manifest, count: int) -> TrainingOptions:
    """The options with a number for everything that was left open.

    Args:
        options: as the caller chose them.
        manifest: of the bundle.
        count: records to train on.
    """
    rate = RATE if options.learning_rate is None else options.learning_rate
    epochs = options.epochs
    per_epoch = max(steps_per_epoch(count, options.records_per_step), 1)
    if epochs is None:
        generates = manifest.task in _GENERATION
        least, steps = (LEAST_EPOCHS, GENERATION_STEPS) if generates else (LEAST_EPOCHS + 1, STEPS)
        epochs = min(max(math.ceil(steps / per_epoch), least), MOST_EPOCHS)
        if manifest.policy.max_steps is not None:  # of one epoch that is too long, the policy's error tells
            epochs = max(min(epochs, manifest.policy.max_steps // per_epoch), 1)
    total = options.steps or epochs * per_epoch
    warmup = options.warmup_steps if options.warmup_steps is not None else min(total // 10, 100)
    return dataclasses.replace(options, learning_rate=rate, epochs=epochs, warmup_steps=warmup)
