"""AdamW, clipping, schedules and sampling against torch and transformers."""

import errno
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import DataError, EdgePeftError, UpdateRejectedError
from edgepeft.runtime.memory.planner import CHUNK_VALUES
from edgepeft.runtime.tasks import Example, task_for
from edgepeft.runtime.training.batches import step_batches
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.sampling import batch_indices, split, steps_per_epoch
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.steps.optimizer import AdamW, AdamWOptions
from edgepeft.runtime.training.steps.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.1, 1.0), (0.01, 1e6)])
def test_adamw_is_torchs(classifier: Path, decay: float, clip: float) -> None:
    """Several tensors, one larger than a chunk, with clipping that bites and that does not."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (CHUNK_VALUES + 7,), "c": (), "d": (0, 4)}
    start = {name: np.array(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    state = TrainingState(start)
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    reference = torch.optim.AdamW(list(theirs.values()), lr=1.0, weight_decay=decay)
    optimizer = AdamW(open_bundle(classifier), state, AdamWOptions(weight_decay=decay, max_grad_norm=clip))
    for step in range(1, 8):
        for name, shape in shapes.items():
            gradient = np.array(rng.standard_normal(shape) * 10.0 ** (step - 4), np.float32)
            state.put_gradient(name, gradient)
            theirs[name].grad = torch.from_numpy(gradient.copy())
        expected_norm = torch.nn.utils.get_total_norm([value.grad for value in theirs.values()])
        if clip:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        reference.param_groups[0]["lr"] = 1e-2 / step
        reference.step()
        assert optimizer.step(step, 1e-2 / step) == pytest.approx(expected_norm.item(), rel=1e-5)
        for name in shapes:
            np.testing.assert_allclose(
                state.parameters[name], theirs[name].detach().numpy(), rtol=2e-5, atol=2e-6
            )
    optimizer.close()


def test_views_share_the_buffer_and_start_is_kept() -> None:
    """Tensors are aligned views; the gaps stay zero."""
    state = TrainingState({"a": np.ones((2, 3), np.float32), "b": np.full(5, 2, np.float32)})
    state.parameters["a"][1, 2] = 9
    param, start = (state.buffers[name].read(0, state.size) for name in ("param", "start"))
    assert (param[5], start[5]) == (9, 1)
    assert state.count == 11
    assert [view.ctypes.data % 64 for view in state.parameters.values()] == [param.ctypes.data % 64] * 2
    assert param.sum() == 5 + 9 + 10


def test_an_update_is_scaled_back_to_its_limit() -> None:
    """In its own direction; one within the limit is left alone."""
    state = TrainingState({"a": np.array([3, 4], np.float32)})
    state.parameters["a"] += np.array([0, 5], np.float32)
    assert state.relative_change() == pytest.approx(1)
    assert state.limit_change(0.5)
    np.testing.assert_allclose(state.parameters["a"], [3, 6.5])
    assert not state.limit_change(0.51)
    zeros = TrainingState({"a": np.zeros(2, np.float32)})
    assert zeros.relative_change() == 0
    assert not zeros.limit_change(0.5)
    zeros.parameters["a"][0] = 1
    with pytest.raises(UpdateRejectedError, match=r"0.5 times as large as what it starts from .* zero here"):
        zeros.limit_change(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (5, 20), (1, 1), (30, 20)])
def test_schedules_are_those_of_transformers(schedule: str, warmup: int, total: int) -> None:
    """Every step, also with a warm-up longer than the run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate(schedule, 3e-4, step, total, warmup) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-18
        )
        optimizer.step()
        theirs.step()


def test_batches_are_a_function_of_seed_and_step() -> None:
    """Each epoch sees every record once, in another order; the order is the documented one."""
    count, size = 10, 4
    assert steps_per_epoch(count, size) == 3
    epochs = [[batch_indices(count, size, 7, 3 * epoch + step) for step in range(3)] for epoch in range(3)]
    orders = [np.concatenate(batches) for batches in epochs]
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(count))
        assert np.array_equal(order, np.random.default_rng([7, epoch]).permutation(count))
    assert not np.array_equal(orders[0], orders[1])
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert not np.array_equal(batch_indices(count, size, 8, 0), epochs[0][0])


def test_batches_have_their_share_of_every_class() -> None:
    """As far as whole records allow; each epoch in another order."""
    classes = np.random.default_rng(0).permutation([0] * 32 + [1] * 8 + [2] * 4)
    for epoch in range(3):
        batches = [batch_indices(44, 11, 7, 4 * epoch + step, classes=classes) for step in range(4)]
        assert sorted(np.concatenate(batches)) == list(range(44))
        assert [np.bincount(classes[batch]).tolist() for batch in batches] == [[8, 2, 1]] * 4
    again = batch_indices(44, 11, 7, 8, classes=classes)
    np.testing.assert_array_equal(again, batches[0])
    assert not np.array_equal(again, batch_indices(44, 11, 7, 0, classes=classes))


def test_a_last_batch_without_a_gradient_is_left_out() -> None:
    """One pair has no negatives."""
    assert steps_per_epoch(9, 4, minimum=2) == 2
    assert [len(batch_indices(9, 4, 0, step, minimum=2)) for step in range(4)] == [4, 4, 4, 4]


def test_a_step_is_cut_into_micro_batches(encoder: Path) -> None:
    """In the order of the one batch; what is left of an epoch makes a smaller step, and one pair none."""
    task = task_for(open_bundle(encoder))
    options = TrainingOptions(batch_size=4, accumulation_steps=2, seed=7)
    examples = [Example()] * 13
    parts = [step_batches(task, examples, options, step).parts for step in range(3)]
    assert [[len(part) for part in step] for step in parts] == [[4, 4], [4], [4, 4]]
    for step, found in enumerate(parts[:2]):
        whole = batch_indices(13, 8, 7, step, minimum=2)
        np.testing.assert_array_equal(np.concatenate(found), whole[: 8 if step == 0 else 4])


def test_the_split_is_fixed_and_complete() -> None:
    """By the seed, whatever the batches are."""
    train, held_out = split(50, 0.2, seed=3)
    assert sorted([*train, *held_out]) == list(range(50))
    assert len(held_out) == 10
    assert np.array_equal(split(50, 0.2, seed=3)[1], held_out)
    assert not np.array_equal(split(50, 0.2, seed=4)[1], held_out)
    assert [len(part) for part in split(2, 0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="has 1 usable records, at least 2 are needed"):
        split(1, 0.5, seed=0)
    with pytest.raises(DataError, match="at least 4"):
        split(3, 0.1, seed=0, minimum=2)


def test_a_state_in_a_file_is_the_same_state(classifier: Path, tmp_path: Path) -> None:
    """Bit for bit, also where gradients are added and the update is limited; the file goes with the state."""
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((70, 9), np.float32), "b": rng.standard_normal(5, np.float32)}
    states = TrainingState(start), TrainingState(start, file_in=tmp_path / "new")
    optimizers = [AdamW(open_bundle(classifier), state, AdamWOptions(weight_decay=0.1)) for state in states]
    for step in range(1, 6):
        gradient = rng.standard_normal(states[0].size, np.float32)
        for state, optimizer in zip(states, optimizers, strict=True):
            state.buffers["grad"].write(0, gradient)
            state.put_gradient("b", gradient[:5], add=True)
            optimizer.step(step, 1e-2)
            assert state.limit_change(0.005 / step)
    for name, buffer in states[0].buffers.items():
        in_file = states[1].buffers[name]
        np.testing.assert_array_equal(buffer.read(0, states[0].size), in_file.read(0, states[0].size))
    for name, tensor in states[0].parameters.items():
        np.testing.assert_array_equal(tensor, states[1].parameters[name])
    for optimizer in optimizers:
        optimizer.close()
    left = weakref.ref(states[1].buffers["param"])
    del states, state, optimizers, optimizer, buffer, in_file, tensor
    assert left() is None
    assert not list((tmp_path / "new").iterdir())  # on Windows, where it has a name, it is gone now


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(EdgePeftError, match="taken: no file of 320 B for the training state"):
        TrainingState({"a": np.ones(3, np.float32)}, file_in=tmp_path / "taken")


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the file is made: its room is taken then, not when a step first writes there."""

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(EdgePeftError, match=r"No space left on device.*free the disk"):
        TrainingState({"a": np.ones(3, np.float32)}, file_in=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_reserves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Nor does every system: the file is as long and holds as much."""

    def unsupported(*_: int) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    state = TrainingState({"a": np.full(3, 7, np.float32)}, file_in=tmp_path)
    np.testing.assert_array_equal(state.parameters["a"], 7)
    assert not state.buffers["grad"].read(0, state.size).any()
