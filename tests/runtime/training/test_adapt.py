"""Updates: the loss curve against torch, the gate, the policy, the checkpoint and the budget."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgepeft
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.bundle.manifest import Policy
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import BudgetError, DataError, EdgePeftError, UpdateRejectedError, UsageError
from edgepeft.runtime.memory import process
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import task_for
from edgepeft.runtime.training.preparation import classes_of
from edgepeft.runtime.training.sampling import batch_indices, split
from edgepeft.runtime.training.steps.schedule import learning_rate
from edgepeft.runtime.training.trainer import Step

from .. import tiny
from ..torch_tiny import TorchClassifier, TorchLanguageModel

FAST: dict[str, Any] = {"learning_rate": 0.02, "batch_size": 4, "steps": 30}


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_the_loss_curve_is_torchs(tmp_path: Path, task: str) -> None:
    """50 steps with warm-up, decay and clipping: losses within 1 %, the adapter within float error."""
    data = tiny.records() if task == "text-classification" else tiny.sentences()
    bundle = tiny.write_bundle(tmp_path / "b", task)
    options: dict[str, Any] = {
        "steps": 50,
        "batch_size": 8,
        "learning_rate": 0.02,
        "warmup_steps": 5,
        "weight_decay": 0.05,
        "max_grad_norm": 0.5,
        "schedule": "cosine",
        "seed": 3,
    }
    with edgepeft.load(bundle) as model:
        report = model.adapt(data, tmp_path / "out", **options)
    reference = (TorchClassifier if task == "text-classification" else TorchLanguageModel)(
        tiny.adapter(task=task)
    )
    optimizer = torch.optim.AdamW(reference.parameters.values(), weight_decay=0.05)
    encoder = task_for(open_bundle(bundle))
    examples = encoder.encode_all(records(data), 16, training=True)
    classes = classes_of(examples, encoder)
    train_on, _ = split(len(examples), 0.1, 3, classes=classes)
    kinds = None if classes is None else classes[train_on]
    expected, rates = [], []
    for step in range(50):
        chosen = [examples[train_on[index]] for index in batch_indices(len(train_on), 8, 3, step, 1, kinds)]
        optimizer.zero_grad()
        loss = reference.loss(encoder.batch(chosen, training=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(reference.parameters.values()), 0.5)
        rates.append(learning_rate("cosine", 0.02, step, 50, 5))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(report.losses, expected, rtol=0.01)
    assert report.learning_rates == rates
    trained = load_adapter(tmp_path / "out")
    for key, parameter in reference.parameters.items():
        np.testing.assert_allclose(trained.tensors[key], parameter.detach().numpy(), atol=2e-4)


def test_an_update_is_kept_and_reported(classifier: Path, tmp_path: Path) -> None:
    """The folder is a PEFT adapter with the configuration as it was, and the report says what happened."""
    steps: list[Step] = []
    with edgepeft.load(classifier, memory_budget="4GiB") as model:
        report = model.adapt(tiny.records(), tmp_path / "out", on_step=steps.append, **FAST)
        assert report.decision == "kept"
        assert report.held_out_after.loss < report.held_out_before.loss
        answers = model.predict(tiny.records(600, seed=9), adapter=tmp_path / "out")
    assert np.mean([item["label"] == item["expected"] for item in answers]) > 0.6
    assert [step.number for step in steps] == list(range(1, 31))
    assert [step.loss for step in steps] == report.losses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    files = ["README.md", "adapt_report.json", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    trained, start = load_adapter(tmp_path / "out"), tiny.adapter()
    assert trained.config == start.config
    assert trained.tensors.keys() == start.tensors.keys()
    assert not any(np.array_equal(trained.tensors[key], start.tensors[key]) for key in start.tensors)
    written = json.loads((tmp_path / "out" / "adapt_report.json").read_text())
    assert written["losses"] == report.losses
    assert written["records"] == {"train": 36, "held_out": 4, "truncated": 0, "left_out": 0, "remembered": 0}
    assert written["memory"]["budget_bytes"] == 4 * 2**30
    assert written["memory"]["measured_peak_bytes"] > 0
    assert written["trained_values"] == sum(tensor.size for tensor in start.tensors.values())


@pytest.mark.parametrize(
    ("trainable", "changed"),
    [("lora", {tiny.A, tiny.B}), ("modules_to_save", {tiny.HEAD, tiny.BIAS})],
)
def test_only_what_is_chosen_trains(
    classifier: Path, tmp_path: Path, trainable: str, changed: set[str]
) -> None:
    """The rest is written as it was."""
    with edgepeft.load(classifier) as model:
        model.adapt(tiny.records(), tmp_path / "out", trainable=trainable, **FAST)
    trained, start = load_adapter(tmp_path / "out").tensors, tiny.adapter().tensors
    assert {key for key in start if not np.array_equal(trained[key], start[key])} == changed


def test_the_policy_is_enforced(tmp_path: Path) -> None:
    """Which tensors, how many steps, how far."""
    policy = Policy(trainable=(tiny.A, tiny.B), max_steps=30, max_relative_change=0.05)
    bundle = tiny.write_bundle(tmp_path / "b", policy=policy)
    with edgepeft.load(bundle) as model:
        report = model.adapt(tiny.records(), tmp_path / "out", **FAST)
        assert report.limited_steps > 0
        assert report.relative_change <= 0.05 * (1 + 1e-5)
        with pytest.raises(UsageError, match="steps is 31, the bundle's policy allows 30"):
            model.adapt(tiny.records(), tmp_path / "more", **{**FAST, "steps": 31})
        with pytest.raises(UsageError, match=r"100 epochs .* policy allows 30 an update: give --steps 30"):
            model.adapt(tiny.records(), tmp_path / "more", epochs=100)
        by_default = model.adapt(tiny.records(), tmp_path / "by-default")
        assert 0 < by_default.steps <= 30
        with pytest.raises(UsageError, match="nothing to train"):
            model.adapt(tiny.records(), tmp_path / "more", trainable="modules_to_save", **FAST)
    trained, start = load_adapter(tmp_path / "out").tensors, tiny.adapter().tensors
    assert np.array_equal(trained[tiny.HEAD], start[tiny.HEAD])
    moved = np.sqrt(sum(np.sum((trained[key] - start[key]) ** 2) for key in (tiny.A, tiny.B)))
    norm = np.sqrt(sum(np.sum(start[key] ** 2) for key in (tiny.A, tiny.B)))
    assert moved / norm == pytest.approx(report.relative_change, rel=1e-4)


def test_a_fresh_adapter_of_another_rank(classifier: Path, tmp_path: Path) -> None:
    """Of the shape and configuration that PEFT would make; the same seed gives the same."""
    with edgepeft.load(classifier) as model:
        for name in ("one", "two"):
            model.adapt(tiny.records(), tmp_path / name, rank=5, **FAST)
    one, two = load_adapter(tmp_path / "one"), load_adapter(tmp_path / "two")
    assert (one.rank(tiny.MODULE), one.scaling(tiny.MODULE)) == (5, 2.0)
    assert one.config["modules_to_save"] == ["classifier"]
    assert one.config["task_type"] == "SEQ_CLS"
    assert all(np.array_equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


def test_an_adapter_that_touches_less_keeps_its_keys(tmp_path: Path) -> None:
    """What it does not carry is not trained and not written."""
    start = tiny.adapter()
    lora = start.with_tensors({key: start.tensors[key] for key in (tiny.A, tiny.B)}, "lora")
    bundle = tiny.write_bundle(tmp_path / "b", adapters={"mine": lora})
    with edgepeft.load(bundle) as model:
        model.adapt(tiny.records(), tmp_path / "out", **FAST)
    assert load_adapter(tmp_path / "out").tensors.keys() == {tiny.A, tiny.B}


def test_a_worse_update_is_rejected(classifier: Path, tmp_path: Path) -> None:
    """The output stays as it was, byte for byte, and the error carries the report."""
    with edgepeft.load(classifier) as model:
        model.adapt(tiny.records(), tmp_path / "out", **FAST)
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        thrown_off = {**FAST, "learning_rate": 5.0}
        with pytest.raises(
            UpdateRejectedError, match=r"held-out loss went from .* is left as it was"
        ) as caught:
            model.adapt(tiny.records(), tmp_path / "out", adapter=str(tmp_path / "out"), **thrown_off)
    assert caught.value.exit_code == 4
    assert caught.value.report is not None
    assert caught.value.report["decision"] == "rejected"
    assert caught.value.report["held_out_after"]["loss"] > caught.value.report["held_out_before"]["loss"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_loss_that_is_no_number_ends_the_update(tmp_path: Path) -> None:
    """Here because the adapter that it starts from overflows."""
    start = tiny.adapter()
    huge = start.with_tensors(
        {**start.tensors, tiny.HEAD: np.full((3, tiny.WIDTH), 3e38, np.float32)}, "huge"
    )
    bundle = tiny.write_bundle(tmp_path / "b", adapters={"huge": huge})
    with edgepeft.load(bundle) as model, pytest.raises(UpdateRejectedError, match=r"step 1: the loss is nan"):
        model.adapt(tiny.records(), tmp_path / "out", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_sentence_pairs_need_two_a_batch(encoder: Path, tmp_path: Path) -> None:
    """And the tiny encoder has no training graph, which is said first."""
    with edgepeft.load(encoder) as model, pytest.raises(UsageError, match=r"nothing to train|--no-train"):
        model.adapt([{"anchor": [1], "positive": [2]}] * 9, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": 17}, "seq_len is 17, the model takes at most 16"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 1e39}, "learning_rate is 1e"),
        ({"weight_decay": "much"}, "weight_decay is 'much'"),
        ({"eval_fraction": 0}, "eval_fraction is 0"),
        ({"eval_fraction": 1}, "eval_fraction is 1"),
        ({"schedule": "spiral"}, "schedule is 'spiral', expected one of linear, cosine, constant"),
        ({"trainable": "everything"}, "trainable is 'everything'"),
        ({"accumulation_steps": 0}, "accumulation_steps is 0"),
        ({"top_blocks": 1}, "the bundle has no stages"),
        ({"optimizer_state": "8bit"}, "has no graph 'adamw8': export it again"),
        ({"strategy": "streamed"}, "strategy is 'streamed', the bundle has resident"),
        ({"rank": 2, "adapter": "mine"}, "give one of them"),
        ({"learning_rat": 1}, "adapt takes no option 'learning_rat'"),
    ],
)
def test_options_are_checked_first(
    classifier: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Before the data is read."""
    with edgepeft.load(classifier) as model, pytest.raises(UsageError, match=message):
        model.adapt(tmp_path / "none.jsonl", tmp_path / "out", **options)


def test_data_that_cannot_be_learned_from(classifier: Path, tmp_path: Path) -> None:
    """Nothing is written."""
    with edgepeft.load(classifier) as model:
        for data, message in (
            ([], "holds no records"),
            (tiny.records(1), "at least 2 are needed"),
            ([*tiny.records(3), {"text": "w1", "label": "mauve"}], "record 4: label 'mauve'"),
        ):
            with pytest.raises(DataError, match=message):
                model.adapt(data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_is_not_written_to(tmp_path: Path) -> None:
    """Except as a new adapter, which then loads; its own are vouched for by their hashes."""
    bundle = tiny.write_bundle(tmp_path / "b")
    with edgepeft.load(bundle) as model:
        for output in (bundle / "adapters" / "mine", bundle / "adapters", bundle / "graphs" / "x", bundle):
            with pytest.raises(UsageError):
                model.adapt(tiny.records(), output, **FAST)
        model.adapt(tiny.records(), bundle / "adapters" / "better", **FAST)
    with edgepeft.load(bundle) as model:
        assert model.adapters == ("mine", "better")
        model.predict(tiny.records(3), adapter="better")


def test_a_budget_that_cannot_be_met(classifier: Path, tmp_path: Path) -> None:
    """Refused before the first step, with the smallest budget that would do, which then does."""
    steps: list[Step] = []
    with edgepeft.load(classifier, memory_budget="3MiB") as model, pytest.raises(BudgetError) as caught:
        model.adapt(tiny.records(), tmp_path / "out", on_step=steps.append, **FAST)
    assert caught.value.exit_code == 3
    assert steps == []
    assert list(tmp_path.iterdir()) == []
    assert f"--budget {caught.value.required_bytes // 2**20}MiB" in str(caught.value)
    with edgepeft.load(classifier, memory_budget=caught.value.required_bytes + 2**24) as model:
        report = model.adapt(tiny.records(), tmp_path / "out", **FAST)
    assert report.memory.measured_peak_bytes <= caught.value.required_bytes + 2**24


def test_a_budget_exceeded_on_the_way(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update stops between two steps, and continues from its checkpoint to the same result."""
    steps: list[Step] = []
    monkeypatch.setattr(
        process.MemoryRecorder,
        "recent_peak_bytes",
        property(lambda _: 2**50 if len(steps) == 13 else 2**20),
    )
    with edgepeft.load(classifier, memory_budget="4GiB") as model:
        with pytest.raises(BudgetError, match=r"step 14: the process peaked at .*--resume --budget"):
            model.adapt(tiny.records(), tmp_path / "out", on_step=steps.append, **FAST)
        assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoint"]
        monkeypatch.undo()
        report = model.adapt(tiny.records(), tmp_path / "out", resume=True, **FAST)
        straight = model.adapt(tiny.records(), tmp_path / "straight", **FAST)
    assert report.resumed_from_step == 14
    assert report.losses == straight.losses
    assert same_adapter(tmp_path / "out", tmp_path / "straight")


@pytest.mark.skipif(not process.reset_peak(), reason="the kernel counts no peak anew")
def test_what_reading_took_does_not_stop_training(classifier: Path, tmp_path: Path) -> None:
    """It is gone by then; the report tells of it."""

    def reading() -> Iterator[dict[str, Any]]:
        block = np.ones(160 * 2**20, np.uint8)
        yield from tiny.records()
        del block

    budget_bytes = process.read_memory().resident_bytes + 96 * 2**20
    with edgepeft.load(classifier, memory_budget=budget_bytes) as model:
        report = model.adapt(reading(), tmp_path / "out", **FAST)
    assert report.stepped_down == []
    assert report.memory.last_peak_bytes < budget_bytes < report.memory.measured_peak_bytes


def same_adapter(one: Path, other: Path) -> bool:
    name = "adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


KILLED = """
import os, signal, sys
import edgepeft
from tests.runtime import tiny

def after(step):
    if step.number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

with edgepeft.load(sys.argv[1], threads=1) as model:
    options = {"learning_rate": 0.02, "batch_size": 4, "steps": 30}
    model.adapt(tiny.records(), sys.argv[2], on_step=after, resume=True, **options)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_bit_for_bit(classifier: Path, tmp_path: Path) -> None:
    """Killed before the first checkpoint, between two and right at one; the result is that of one run."""
    root = Path(__file__).parents[3]
    for step in (4, 17, 20):
        command = [sys.executable, "-c", KILLED, str(classifier), str(tmp_path / "out"), str(step)]
        done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists()
    with edgepeft.load(classifier, threads=1) as model:
        resumed = model.adapt(tiny.records(), tmp_path / "out", resume=True, **FAST)
        straight = model.adapt(tiny.records(), tmp_path / "straight", **FAST)
    assert resumed.resumed_from_step == 20
    assert resumed.losses == straight.losses
    assert resumed.held_out_before == straight.held_out_before
    assert same_adapter(tmp_path / "out", tmp_path / "straight")
    assert not (tmp_path / "out.checkpoint").exists()


@pytest.mark.slow
def test_killed_at_any_moment(classifier: Path, tmp_path: Path) -> None:
    """From outside, at times that nobody chose: whatever is left, the next run ends as one run does."""
    root = Path(__file__).parents[3]
    for delay_s in np.random.default_rng(0).uniform(0.2, 1.2, 8):
        command = [sys.executable, "-c", KILLED, str(classifier), str(tmp_path / "out"), "0"]
        with subprocess.Popen(command, cwd=root) as running:
            time.sleep(delay_s)
            running.kill()
    with edgepeft.load(classifier, threads=1) as model:
        model.adapt(tiny.records(), tmp_path / "out", resume=True, **FAST)
        model.adapt(tiny.records(), tmp_path / "straight", **FAST)
    assert same_adapter(tmp_path / "out", tmp_path / "straight")


def interrupted(model: Any, output: Path, **options: Any) -> Path:
    """Leave a checkpoint behind."""

    def stop(step: Step) -> None:
        if step.number == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.adapt(tiny.records(), output, on_step=stop, **{**FAST, **options})
    return output.parent / f"{output.name}.checkpoint"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"steps": 31}, "steps"),
        ({"seed": 1}, "seed"),
        ({"rank": 2}, "adapter"),
        ({"batch_size": 5}, "batch_size"),
    ],
)
def test_a_checkpoint_of_another_update_is_refused(
    classifier: Path, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    """The error names what differs."""
    with edgepeft.load(classifier) as model:
        interrupted(model, tmp_path / "out")
        with pytest.raises(UsageError, match=rf"was made with {name} .* over without --resume"):
            model.adapt(tiny.records(), tmp_path / "out", resume=True, **{**FAST, **options})
        with pytest.raises(UsageError, match="was made with data"):
            model.adapt(tiny.records(seed=1), tmp_path / "out", resume=True, **FAST)


def test_a_broken_checkpoint_is_refused(classifier: Path, tmp_path: Path) -> None:
    """Truncated, of something else, empty; without --resume it is not looked at."""
    with edgepeft.load(classifier) as model:
        path = interrupted(model, tmp_path / "out")
        whole = path.read_bytes()
        save_adapter(tiny.adapter(), tmp_path / "adapter")
        other = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        for content in (b"", whole[:-4], whole[: len(whole) // 2], other):
            path.write_bytes(content)
            with pytest.raises(UsageError, match="is no checkpoint"):
                model.adapt(tiny.records(), tmp_path / "out", resume=True, **FAST)
        for place in np.random.default_rng(0).integers(len(whole) - 300, len(whole), 20):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(UsageError, match=r"is damaged: .* has the CRC-32 .*: remove it"):
                model.adapt(tiny.records(), tmp_path / "out", resume=True, **FAST)
        model.adapt(tiny.records(), tmp_path / "out", **FAST)
        assert not path.exists()


def test_a_full_disk_keeps_the_old_adapter(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the result is written."""
    with edgepeft.load(classifier) as model:
        model.adapt(tiny.records(), tmp_path / "out", **FAST)
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        real = os.fsync

        def full(descriptor: int) -> None:
            if "checkpoint" not in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(EdgePeftError, match="the disk is full"):
            model.adapt(tiny.records(), tmp_path / "out", seed=1, **FAST)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
