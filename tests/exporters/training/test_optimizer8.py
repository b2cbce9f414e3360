"""AdamW with moments in 8 bits: the code book, the graph against numpy, and what it learns against AdamW."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import edgepeft
from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import UsageError
from edgepeft.exporters.training.optimizer import build_adamw
from edgepeft.exporters.training.optimizer8 import build_adamw8, dynamic_map
from edgepeft.runtime.memory.planner import CHUNK_VALUES, plans
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.starting import trained_names
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.steps.optimizer import AdamW, AdamWOptions
from edgepeft.runtime.training.workload import workload

from ..interrupting import resumed, same_tensors

Switched = Callable[[str], Path]
Arrays = dict[str, np.ndarray]
SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_coef": 1.0}


def bitsandbytes_map(signed: bool) -> np.ndarray:
    """`bitsandbytes.functional.create_dynamic_map` in numpy, line by line."""
    data = []
    for i in range(7):
        items = int(2**i + 1 if signed else 2 ** (i + 1) + 1)
        boundaries = np.linspace(0.1, 1, items)
        means = (boundaries[:-1] + boundaries[1:]) / 2
        data += ((10 ** (-6 + i)) * means).tolist()
        if signed:
            data += (-(10 ** (-6 + i)) * means).tolist()
    return np.array(sorted([*data, 0.0, 1.0]), np.float32)


def session(model: ir.Model) -> Callable[[Arrays], Arrays]:
    """A graph as a function."""
    opened = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [item.name for item in opened.get_outputs()]
    return lambda feeds: dict(zip(names, opened.run(names, feeds), strict=True))


def scalars(step: int) -> Arrays:
    return {name: np.array(value, np.float32) for name, value in {**SCALARS, "step": step}.items()}


def zeros(count: int) -> Arrays:
    buffers = OPTIMIZER_STATES["8bit"].buffers.items()
    return {name: np.zeros(count // item.values, item.dtype) for name, item in buffers}


def decoded(state: Arrays, name: str) -> np.ndarray:
    """Moments by a look-up in the reference's book."""
    book = bitsandbytes_map(signed=name == "exp_avg")
    return book[state[name]] * np.repeat(state[f"{name}_absmax"], 256)


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_is_that_of_bitsandbytes(signed: bool) -> None:
    np.testing.assert_allclose(dynamic_map(signed=signed), bitsandbytes_map(signed), rtol=1e-6)
    assert len(dynamic_map(signed=signed)) == 256


def test_a_step_is_adamws_and_rounds_to_the_nearest_code() -> None:
    """Twenty steps from the graph's own state, over ten decades of gradients, zeros and a block of zeros."""
    rng = np.random.default_rng(0)
    count = 256 * 40
    scale = 10.0 ** rng.uniform(-6, 4, (40, 1)) * 10.0 ** rng.uniform(-7, 0, (40, 256))
    scale[7], scale[:, 5] = 0, 0
    run, exact = session(build_adamw8()), session(build_adamw())
    param, state = rng.standard_normal(count).astype(np.float32), zeros(count)
    for step in range(1, 21):
        grad = (rng.standard_normal((40, 256)) * scale).astype(np.float32).ravel()
        before = {name: decoded(state, name) for name in ("exp_avg", "exp_avg_sq")}
        feeds = {"param": param, "grad": grad, **scalars(step)}
        expected = exact({**feeds, **before})
        outputs = run({**feeds, **state})
        np.testing.assert_allclose(outputs["param_out"], expected["param_out"], rtol=1e-5, atol=1e-7)
        state = {name: outputs[f"{name}_out"] for name in state}
        param = outputs["param_out"]
        for name in before:
            wanted = expected[f"{name}_out"].astype(np.float64)
            absmax = np.abs(wanted.reshape(-1, 256)).max(1)
            np.testing.assert_allclose(state[f"{name}_absmax"], absmax, rtol=1e-6)
            book = bitsandbytes_map(signed=name == "exp_avg").astype(np.float64)
            scaled = wanted / np.maximum(np.repeat(absmax, 256), 1e-38)
            nearest = np.abs(scaled[:, None] - book[None]).min(1)
            got = np.abs(scaled - book[state[name]])
            raised = (name == "exp_avg_sq") & (scaled > 0) & (scaled < book[1])  # never to zero
            assert (state[name][raised] == 1).all()
            assert (got <= nearest * (1 + 1e-3) + 1e-9)[~raised].all()
        assert (decoded(state, "exp_avg_sq")[grad != 0] > 0).all()


def quadratic(eight_bit: bool, steps: int = 200) -> list[float]:
    """Losses of least squares with gradients of many magnitudes, by either graph."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((256, 512)).astype(np.float32) * 10.0 ** rng.uniform(-2, 0, 512)
    target = inputs @ rng.standard_normal(512)
    run = session(build_adamw8() if eight_bit else build_adamw())
    state = (
        zeros(512) if eight_bit else {name: np.zeros(512, np.float32) for name in ("exp_avg", "exp_avg_sq")}
    )
    param, losses = np.zeros(512, np.float32), []
    for step in range(1, steps + 1):
        rows = rng.permutation(256)[:32]
        error = inputs[rows] @ param - target[rows]
        losses.append(float(np.mean((inputs @ param - target) ** 2)))
        grad = (2 * inputs[rows].T @ error / 32).astype(np.float32)
        outputs = run({"param": param, "grad": grad, **state, **scalars(step)})
        param = outputs["param_out"]
        state = {name: outputs[f"{name}_out"] for name in state}
    return losses


def test_two_hundred_steps_reach_what_adamw_reaches() -> None:
    ours, exact = quadratic(eight_bit=True), quadratic(eight_bit=False)
    assert exact[-1] < 0.2 * exact[0]
    assert ours[-1] == pytest.approx(exact[-1], rel=0.05)


def test_chunks_and_tensors_share_no_block(switched: Switched) -> None:
    """A tensor longer than a chunk and short ones, against the graph on each tensor alone."""
    bundle = open_bundle(switched("decoder"))
    rng = np.random.default_rng(0)
    sizes = {"long": CHUNK_VALUES + 300, "short": 5, "none": 0, "other": 256}
    start = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    state = TrainingState(start, optimizer=OPTIMIZER_STATES["8bit"])
    optimizer = AdamW(
        bundle, state, AdamWOptions(weight_decay=0.01, max_grad_norm=0.0), OPTIMIZER_STATES["8bit"]
    )
    run = session(build_adamw8())
    alone = {name: zeros(-(-size // 256) * 256) for name, size in sizes.items()}
    for step in range(1, 4):
        for name, size in sizes.items():
            grad = rng.standard_normal(size, np.float32) * np.float32(10.0 ** len(name))
            state.put_gradient(name, grad)
            if size:
                padding = -size % 256
                feeds = {"param": np.pad(start[name], (0, padding)), "grad": np.pad(grad, (0, padding))}
                outputs = run({**feeds, **alone[name], **scalars(step)})
                start[name] = outputs["param_out"][:size]
                alone[name] = {key: outputs[f"{key}_out"] for key in alone[name]}
        optimizer.step(step, SCALARS["lr"])
        for name, expected in start.items():
            np.testing.assert_allclose(state.parameters[name], expected, rtol=1e-6, atol=1e-7)
    optimizer.close()


def test_gradients_that_are_no_numbers_leave_no_code_outside_the_book() -> None:
    """So that the update ends with its own error, about the loss."""
    run = session(build_adamw8())
    grad = np.array([np.nan, np.inf, -np.inf, 1, 0] + 251 * [2], np.float32)
    feeds = {"param": np.ones(256, np.float32), "grad": grad, **scalars(1)}
    outputs = run({**feeds, **zeros(256)})
    run({**feeds, **{name: outputs[f"{name}_out"] for name in zeros(256)}})


def test_an_update_learns_as_with_32_bits_and_resumes_bit_for_bit(switched: Switched, tmp_path: Path) -> None:
    data = [{"input_ids": [(3 * i + j) % 40 + 10 for j in range(8)]} for i in range(24)]
    options: dict[str, Any] = {"steps": 30, "batch_size": 4, "learning_rate": 5e-3, "seq_len": 16}
    with edgepeft.load(switched("decoder"), threads=1) as device:
        exact = device.adapt(data, tmp_path / "exact", **options)
        options["optimizer_state"] = "8bit"
        ours = device.adapt(data, tmp_path / "ours", **options)
        again = resumed(device, data, tmp_path / "again", at=13, **options)
    assert again.losses == ours.losses
    assert same_tensors(tmp_path / "again", tmp_path / "ours")
    assert exact.held_out_after.loss < 0.95 * exact.held_out_before.loss
    assert ours.held_out_after.loss == pytest.approx(exact.held_out_after.loss, rel=0.02)
    assert not same_tensors(tmp_path / "exact", tmp_path / "ours")


def test_the_plan_counts_a_quarter(switched: Switched, tmp_path: Path) -> None:
    """And refuses what is not there."""
    bundle = open_bundle(switched("decoder"))
    adapter = bundle.adapter("default")
    found = []
    for bits in ("32bit", "8bit"):
        options = TrainingOptions(optimizer_state=bits)
        names = trained_names(bundle.manifest, adapter, options)
        found.append(plans(bundle.manifest, workload(adapter, names, 8, 16, options), 0)[0].state_bytes)
        state = TrainingState({"a": np.ones(2560, np.float32)}, optimizer=OPTIMIZER_STATES[bits])
        kept = [state.buffers[name] for name in state.moments]
        kept_bytes = sum(len(moment) * moment.dtype.itemsize for moment in kept)
        assert kept_bytes == OPTIMIZER_STATES[bits].bytes_per_value * 2560
    count = sum(adapter.tensors[name].size for name in names)
    assert found[0] - found[1] == pytest.approx((8 - 2 - 2 * 4 / 256) * count, abs=1)
    with (
        edgepeft.load(switched("decoder")) as device,
        pytest.raises(UsageError, match="optimizer_state is '4bit'"),
    ):
        device.adapt([], tmp_path / "out", optimizer_state="4bit")
