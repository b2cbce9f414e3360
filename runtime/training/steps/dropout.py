"""What the training graphs take to drop values in front of LoRA's `A`, and to drop none."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.wiring import DROPOUT
from edgepeft.slots import LORA

from ...inputs import dropout_inputs, nothing_dropped
from ..report import DropoutReport

Array = npt.NDArray[np.generic]


def dropout_of(manifest: Manifest, adapter: Adapter, *, exact: bool) -> DropoutReport:
    """What an adapter wants dropped, and where that is done; nowhere without `exact` gradients."""
    asked = {
        name: float(value)
        for name, value in adapter.config.items()
        if name.endswith("dropout") and isinstance(value, int | float) and value > 0
    }
    rate = asked.get("lora_dropout", 0.0) if adapter.technique.name == LORA and exact else 0.0
    offered = {name.removeprefix(DROPOUT) for name in dropout_inputs(manifest)}
    applied = len(offered.intersection(adapter.modules)) if rate else 0
    return DropoutReport(asked, len(adapter.modules), applied, rate if applied else 0.0)


class Dropout:
    """Adds to batches what says which values are dropped: other ones for every batch and module.

    They follow from the seed, the step and the batch's number in it, so they are the same in every way to
    train and in an update that is resumed.

    Args:
        manifest: of the bundle.
        rate: the share that is dropped, from 0 to below 1.
        seed: of the update.
    """

    def __init__(self, manifest: Manifest, rate: float, seed: int) -> None:
        self._nothing = nothing_dropped(manifest)
        self._names = dropout_inputs(manifest)
        self._threshold = round(rate * 2**32) - 2**31
        self._seed = seed
        self._generator = np.random.default_rng(seed)

    def begin(self, number: int) -> None:
        """A step begins, the `number`-th from 1."""
        self._generator = np.random.default_rng([self._seed, number])

    def added_to(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The batch with `dropout.MODULE`, int32 `[5]`, for each module; see `exporters.training.dropout`."""
        if self._threshold == -(2**31):
            return {**batch, **self._nothing}
        seeds = self._generator.integers(-(2**31), 2**31, (len(self._names), 4))
        drawn = np.insert(seeds, 0, self._threshold, axis=1).astype(np.int32)
        return {**batch, **dict(zip(self._names, drawn, strict=True))}
