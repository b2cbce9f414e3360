"""Micro-batches whose gradients are added up, against one batch of all their records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import UsageError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import task_for
from edgepeft.runtime.training.batches import step_batches
from edgepeft.runtime.training.gradients.strategies import open_gradients
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.steps.descent import accumulate

from ..interrupting import resumed, same_tensors

Switched = Callable[[str], Path]


def data_of(kind: str, count: int = 11) -> list[dict[str, Any]]:
    """Records of unequal lengths: most of them count few tokens, some count many."""
    rng = np.random.default_rng(5)
    made: list[dict[str, Any]] = []
    for index in range(count):
        ids = rng.integers(3, 300, 3 if index % 3 else 12).tolist()
        made.append({"input_ids": ids} if kind == "decoder" else {"input_ids": ids, "label": index % 3})
    return made


@pytest.mark.parametrize("strategy", ["resident", "streamed"])
@pytest.mark.parametrize("kind", [pytest.param("classifier", marks=pytest.mark.slow), "decoder"])
def test_micro_batches_give_the_gradient_of_the_big_batch(
    switched: Switched, kind: str, strategy: str
) -> None:
    """Also where a plain average of their gradients would not, and with a last part that is smaller."""
    bundle = open_bundle(switched(kind))
    task = task_for(bundle)
    examples = task.encode_all(records(data_of(kind)), 16, training=True)
    inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
    rng = np.random.default_rng(0)
    start = {
        name: 0.1 * rng.standard_normal(inputs[name].shape, np.float32)
        for name in bundle.manifest.policy.trainable
    }
    found, plain = [], []
    way = next(item for item in bundle.manifest.strategies if item.name == strategy)
    for size, parts in ((11, 1), (2, 6)):
        state = TrainingState(start, adds_up=True)
        options = TrainingOptions(batch_size=size, accumulation_steps=parts)
        batches = step_batches(task, examples, options, 0)
        assert len(batches) == parts
        gradients = open_gradients(bundle, way, inputs, state)
        loss = accumulate(gradients, batches, state)
        grad = state.buffers["grad"]
        found.append((loss, grad.read(0, state.size).copy()))
        for batch in batches:
            gradients.run(batch)
            plain.append(grad.read(0, state.size).copy())
        gradients.close()
    (loss, whole), (same_loss, added) = found
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert np.linalg.norm(added - whole) <= 1e-6 * np.linalg.norm(whole)
    averaged = np.mean(plain[1:], axis=0)
    assert np.linalg.norm(averaged - whole) > 0.01 * np.linalg.norm(whole)


def test_an_update_in_micro_batches_learns_what_one_in_batches_does(
    switched: Switched, tmp_path: Path
) -> None:
    """The same records a step, epochs that end within a step, and the same after an interruption."""
    options: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-3, "seq_len": 16}
    with edgepeft.load(switched("decoder"), threads=1) as device:
        data = data_of("decoder", 24)
        whole = device.adapt(data, tmp_path / "whole", batch_size=8, **options)
        parts = {**options, "batch_size": 2, "accumulation_steps": 4}
        added = device.adapt(data, tmp_path / "added", **parts)
        again = resumed(device, data, tmp_path / "again", at=4, **parts)
    assert added.steps == whole.steps == 9
    np.testing.assert_allclose(added.losses, whole.losses, rtol=1e-4)
    np.testing.assert_allclose(added.grad_norms, whole.grad_norms, rtol=1e-3)
    assert again.losses == added.losses
    assert same_tensors(tmp_path / "again", tmp_path / "added")


def test_a_number_of_micro_batches_is_checked(switched: Switched, tmp_path: Path) -> None:
    with (
        edgepeft.load(switched("decoder")) as device,
        pytest.raises(UsageError, match="accumulation_steps is 0"),
    ):
        device.adapt(data_of("decoder"), tmp_path / "out", accumulation_steps=0)
