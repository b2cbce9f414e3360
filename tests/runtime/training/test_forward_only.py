"""Gradients estimated by forward passes, against torch's on the same tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgepeft.bundle.manifest import Strategy
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.adapters.graph_inputs import graph_inputs, to_peft_layout
from edgepeft.runtime.memory.planner import CHUNK_VALUES
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import task_for
from edgepeft.runtime.training.batches import StepBatches, step_batches
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.steps.forward_only import EPSILON, ForwardOnly, perturb

from .. import tiny
from ..torch_tiny import TorchClassifier

FORWARD_ONLY = Strategy("forward-only", None, exact=False, memory=MemoryFormula(0, ()))
SEED = 7


def direction(state: TrainingState, step: int) -> dict[str, np.ndarray]:
    """The documented numbers, drawn whole."""
    return {
        name: np.random.Generator(np.random.Philox(key=SEED, counter=[0, 0, index, step]))
        .standard_normal(tensor.size, np.float32)
        .reshape(tensor.shape)
        for index, (name, tensor) in enumerate(state.parameters.items())
    }


class Tried:
    """A trained tiny classifier, three micro-batches of different sizes, and the same in torch."""

    def __init__(self, folder: Path, **options: float) -> None:
        self.adapter = tiny.adapter(rank=3, trained=True)
        self.bundle = open_bundle(tiny.write_bundle(folder / "b", adapters={"mine": self.adapter}))
        task = task_for(self.bundle)
        examples = task.encode_all(records(tiny.records(10)), 16, training=True)
        chosen = TrainingOptions(batch_size=4, accumulation_steps=3, seed=SEED, **options)
        self.batches: StepBatches = step_batches(task, examples, chosen, 0)
        assert [len(part) for part in self.batches.parts] == [4, 4, 2]
        inputs = graph_inputs(self.bundle, [(self.adapter, 1.0)])
        self.start = {name: inputs[name] for name in self.bundle.manifest.policy.trainable}
        self.state = TrainingState(self.start, optimizer=None)
        self.stepper = ForwardOnly(self.bundle, FORWARD_ONLY, task, inputs, self.state, chosen)

    def reset(self) -> None:
        for name, parameter in self.state.parameters.items():
            parameter[...] = self.start[name]

    def torch_loss(self, tensors: dict[str, np.ndarray]) -> torch.Tensor:
        """The mean over all ten records, at tensors in the graphs' layout."""
        adapter = self.adapter.with_tensors(to_peft_layout(self.bundle, tensors), "moved")
        self.reference = TorchClassifier(adapter)
        losses = [self.reference.loss(batch) * len(batch["labels"]) for batch in self.batches]
        return sum(losses[1:], losses[0]) / 10


def test_the_slope_is_the_central_difference_along_z(tmp_path: Path) -> None:
    """And the step goes by it along z, after which nothing of the perturbation is left."""
    tried = Tried(tmp_path, max_grad_norm=0.0)
    for step in (1, 2, 90):
        tried.reset()
        z = direction(tried.state, step)
        ends = [
            {name: value + np.float32(sign * EPSILON) * z[name] for name, value in tried.start.items()}
            for sign in (1, -1)
        ]
        above, below = (tried.torch_loss(end).item() for end in ends)
        expected = (above - below) / (2 * EPSILON)
        loss, size = tried.stepper.step(tried.batches, step, 0.1)
        assert loss == pytest.approx((above + below) / 2, rel=1e-5)
        assert size == pytest.approx(abs(expected), abs=1e-3)
        for name, value in tried.state.parameters.items():
            np.testing.assert_allclose(value, tried.start[name] - 0.1 * expected * z[name], atol=1e-3)
    tried.stepper.close()


def test_the_estimate_is_the_gradient_on_average(tmp_path: Path) -> None:
    """Within the error that the mean of so many estimates has."""
    tried = Tried(tmp_path, max_grad_norm=0.0)
    tried.torch_loss(tried.start).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in tried.reference.parameters.items()}
    gradient = np.concatenate(
        [(gradients[name].T if "lora" in name else gradients[name]).ravel() for name in tried.start]
    )
    count = 1500
    total, squares = np.zeros(len(gradient)), 0.0
    for step in range(1, count + 1):
        tried.reset()
        _, slope = tried.stepper.step(tried.batches, step, 1.0)
        estimate = [(tried.start[name] - tried.state.parameters[name]).ravel() for name in tried.start]
        total += np.concatenate(estimate)
        squares += slope**2
    tried.stepper.close()
    mean, norm = total / count, float(np.linalg.norm(gradient))
    # The variance of g z_i is |gradient|^2 + gradient_i^2.
    deviations = (mean - gradient) / np.sqrt((norm**2 + gradient**2) / count)
    assert np.mean(deviations**2) < 2
    assert np.abs(deviations).max() < 5
    assert mean @ gradient / np.linalg.norm(mean) / norm > 0.9
    assert squares / count == pytest.approx(norm**2, rel=0.2)


def test_clipping_and_decay(tmp_path: Path) -> None:
    """The slope is clipped like a norm; the decay is AdamW's."""
    tried = Tried(tmp_path, max_grad_norm=1e-3, weight_decay=0.5)
    _, size = tried.stepper.step(tried.batches, 1, 0.1)
    assert size > 1e-3
    z = direction(tried.state, 1)
    for name, value in tried.state.parameters.items():
        moved = np.abs(value - 0.95 * tried.start[name])
        np.testing.assert_allclose(moved, 0.1 * 1e-3 * np.abs(z[name]), atol=1e-6)
    tried.stepper.close()


def test_a_direction_is_drawn_in_pieces() -> None:
    """Of a tensor longer than a piece, the same numbers; another seed, step and tensor give others."""
    size = CHUNK_VALUES + 5
    state = TrainingState({name: np.zeros(size, np.float32) for name in "ab"}, optimizer=None)
    perturb(state.parameters, SEED, 3, 1.0)
    for name, expected in direction(state, 3).items():
        np.testing.assert_array_equal(state.parameters[name], expected)
    drawn = [state.parameters["a"].copy(), state.parameters["b"].copy()]
    for seed, step in ((SEED, 4), (SEED + 1, 3)):
        state.buffers["param"].write(0, np.zeros(state.size, np.float32))
        perturb(state.parameters, seed, step, 1.0)
        drawn.append(state.parameters["a"].copy())
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.02


def test_there_is_nothing_but_parameters() -> None:
    state = TrainingState({"a": np.ones((3, 5), np.float32)}, optimizer=None)
    assert len(state.buffers["grad"]) == 0
    assert state.gradients == {}
    assert state.moments == ()
