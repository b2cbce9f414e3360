"""An update that is stopped between two steps and continued."""

from pathlib import Path
from typing import Any

import pytest

from edgepeft.runtime.model import Model
from edgepeft.runtime.training.report import AdaptReport
from edgepeft.runtime.training.trainer import Step


def resumed(device: Model, data: list[dict[str, Any]], output: Path, at: int, **options: Any) -> AdaptReport:
    """Stop after step `at`, right behind its checkpoint, and continue."""

    def stop(step: Step) -> None:
        if step.number == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgepeft.runtime.training.adapt.CHECKPOINT_STEPS", at)
        with pytest.raises(KeyboardInterrupt):
            device.adapt(data, output, on_step=stop, **options)
    report = device.adapt(data, output, resume=True, **options)
    assert report.resumed_from_step == at
    return report


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two adapters have the same bits."""
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()
