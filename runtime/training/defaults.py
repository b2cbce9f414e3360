"""What an update does where it is not told: by task and number of records.

The figures were chosen on real texts; docs/defaults.md has them, and those on texts that chose nothing.
"""

import dataclasses
import math

from edgepeft.bundle.manifest import Manifest
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.sampling import steps_per_epoch

FEW = 500
"""Records below which a classifier learns its head in closed form and nothing else: more than that needs
records to be judged by."""
STEPS = 60
"""Steps that an update takes at least, within `MOST_EPOCHS`."""
MOST_EPOCHS = 10
_GENERATION = ("text-generation", "text2text-generation", "fill-mask")


def with_defaults(
    options: TrainingOptions, manifest: Manifest, count: int, *, from_closed_form: bool
) -> TrainingOptions:
    """The options with a number for everything that was left open.

    Args:
        options: as the caller chose them.
        manifest: of the bundle.
        count: records to train on.
        from_closed_form: training starts from a head that was fitted.
    """
    rate = options.learning_rate
    if rate is None:
        rate = 1e-3 if manifest.task in _GENERATION or from_closed_form else 2e-3
    epochs = options.epochs
    per_epoch = max(steps_per_epoch(count, options.records_per_step), 1)
    if epochs is None:
        epochs = min(max(math.ceil(STEPS / per_epoch), 2), MOST_EPOCHS)
    total = options.steps or epochs * per_epoch
    warmup = options.warmup_steps if options.warmup_steps is not None else min(total // 10, 100)
    return dataclasses.replace(options, learning_rate=rate, epochs=epochs, warmup_steps=warmup)
