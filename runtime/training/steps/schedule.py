"""Learning-rate schedules, step for step those of transformers.

Source: `transformers.optimization.get_linear_schedule_with_warmup` and its cosine and constant kin.
"""

import math

SCHEDULES = ("linear", "cosine", "constant")


def learning_rate(schedule: str, peak: float, step: int, total_steps: int, warmup_steps: int) -> float:
    """The rate of a step.

    Args:
        schedule: one of `SCHEDULES`.
        peak: the rate at the end of the warm-up.
        step: from 0.
        total_steps: steps of the whole update.
        warmup_steps: steps over which the rate rises from 0.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return peak * max(0.0, 1.0 - progress)
