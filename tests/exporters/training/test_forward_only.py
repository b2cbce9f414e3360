"""Training by forward passes on exported bundles: in stages and without, in a budget, never unasked."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.cli import main
from edgepeft.errors import BudgetError, UsageError
from edgepeft.exporters.measure.feeds import axis_sizes, sample_adapter, sample_batch
from edgepeft.exporters.measure.tensors import read_profile
from edgepeft.runtime.memory.planner import Workload, choose, plans
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.state.buffers import TrainingState

from ..interrupting import resumed, same_tensors

Switched = Callable[[str], Path]
OPTIONS: dict[str, Any] = {
    "strategy": "forward-only",
    "steps": 60,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "max_grad_norm": 10.0,
    "eval_fraction": 0.25,
    "schedule": "constant",
    "seq_len": 16,
}


def data_of(kind: str) -> list[dict[str, Any]]:
    """Phrases that repeat, whole or in two halves."""
    phrases = [[(3 * index + place) % 12 + 10 for place in range(8)] for index in range(24)]
    if kind == "seq2seq":
        return [{"prompt": phrase[:4], "completion": phrase[4:]} for phrase in phrases]
    return [{"input_ids": phrase} for phrase in phrases]


@pytest.mark.parametrize("kind", ["decoder", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_a_loss_goes_down_and_an_update_resumes_bit_for_bit(
    switched: Switched, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With neither gradients nor moments, and the report says what it was."""
    states: list[TrainingState] = []

    def spied(*args: Any, **options: Any) -> TrainingState:
        states.append(TrainingState(*args, **options))
        return states[-1]

    monkeypatch.setattr("edgepeft.runtime.training.preparation.TrainingState", spied)
    with edgepeft.load(switched(kind), threads=1) as device:
        report = device.adapt(data_of(kind), tmp_path / "straight", **OPTIONS)
        again = resumed(device, data_of(kind), tmp_path / "again", at=23, **OPTIONS)
    assert not report.exact_gradients
    assert report.strategy == "forward-only, estimated gradients"
    assert report.held_out_after.loss < report.held_out_before.loss
    assert np.mean(report.losses[-10:]) < np.mean(report.losses[:10])
    assert again.losses == report.losses
    assert same_tensors(tmp_path / "again", tmp_path / "straight")
    assert all(len(state.buffers["grad"]) == 0 and not state.moments for state in states)


def test_it_is_not_chosen_unasked_but_named(switched: Switched, tmp_path: Path) -> None:
    """Neither without a budget nor below that of the others; a checkpoint of its own is no other's."""
    manifest = open_bundle(switched("decoder")).manifest
    sizes = Workload(rows=32, seq_len=64, rank=4, adapter_values=100_000, trained_values=100_000)
    candidates = plans(manifest, sizes, 50 * 2**20)
    strategies = ["resident", "checkpointed", "streamed", "streamed", "streamed", "streamed", "forward-only"]
    assert [plan.strategy for plan in candidates] == strategies
    smallest = min(plan.peak_bytes for plan in candidates if plan.exact)
    estimating = candidates[-1]
    assert estimating.state_bytes < candidates[1].state_bytes - 12 * 100_000
    assert estimating.activation_bytes < 0.7 * candidates[1].activation_bytes
    assert choose(candidates, None).strategy == "resident"
    assert choose(candidates[-1:], None) is estimating
    assert estimating.peak_bytes < smallest - 1
    with pytest.raises(BudgetError, match=r"--strategy forward-only fits with .* many more steps") as caught:
        choose(candidates, smallest - 1)
    assert caught.value.required_bytes >= smallest
    with pytest.raises(BudgetError) as caught:
        choose(candidates, estimating.peak_bytes - 1)
    assert "forward-only" not in str(caught.value)
    with edgepeft.load(switched("decoder")) as device:
        for options, message in (
            (
                {"strategy": "sideways"},
                "strategy is 'sideways', the bundle has resident, checkpointed, streamed, forward-only",
            ),
            ({"strategy": "forward-only", "optimizer_state": "8bit"}, "forward-only keeps none"),
        ):
            with pytest.raises(UsageError, match=message):
                device.adapt(data_of("decoder"), tmp_path / "out", **options)
        streamed = device.adapt(
            data_of("decoder"), tmp_path / "out", **{**OPTIONS, "strategy": "streamed", "learning_rate": 1e-3}
        )
        assert streamed.strategy == "streamed, 3 of 3 stages held"

        def stop(step: Any) -> None:
            if step.number == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            device.adapt(data_of("decoder"), tmp_path / "out", on_step=stop, **OPTIONS)
        with pytest.raises(UsageError, match="was made with exact_gradients False"):
            device.adapt(
                data_of("decoder"), tmp_path / "out", resume=True, **{**OPTIONS, "strategy": "resident"}
            )


def test_the_commands_say_what_it_is(switched: Switched, tmp_path: Path) -> None:
    """`plan` lists it with the switches' effect, `adapt` warns of it."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in data_of("decoder")))

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    plan = ("plan", switched("decoder"), "--budget", "4GiB", "--seq-len", "16")
    text = run(*plan)
    assert "forward-only, estimated gradients" in text
    state_bytes = [
        json.loads(run(*plan, "--json", *switches))["strategies"][0]["state_bytes"]
        for switches in (
            ("--accumulate", "4"),
            (),
            ("--optimizer-state", "8bit"),
            ("--trainable", "lora_B"),
            ("--trainable", "lora_B", "--top-blocks", "1"),
        )
    ]
    assert state_bytes == sorted(state_bytes, reverse=True)
    assert len(set(state_bytes)) == 5
    options = ("--strategy", "forward-only", "--steps", "20", "--lr", "3e-3", "--seq-len", "16")
    done = run(
        *("adapt", switched("decoder"), "--data", data, "--budget", "4GiB", "-o", tmp_path / "out"),
        *(*options, "--eval-fraction", "0.25", "--batch-size", "4", "--accumulate", "2"),
        *("--max-grad-norm", "10"),
    )
    assert "estimated by forward passes: expect to need many more steps" in done


def test_the_formula_is_that_of_the_forward_chain(switched: Switched, tmp_path: Path) -> None:
    """At sizes that it has not seen, onnxruntime's own figure for the tensors of all stages."""
    bundle = open_bundle(switched("decoder"))
    formula = bundle.manifest.strategies[-1].memory
    for index, (batch, sequence) in enumerate(itertools.product((3, 16), (20, 60))):
        chain = Chain(bundle, sample_adapter(bundle.manifest, 4), profile=str(tmp_path / str(index)))
        feeds = sample_batch(bundle.manifest, axis_sizes(batch, sequence))
        chain.evaluate(feeds)
        chain.evaluate(feeds)
        in_use = np.concatenate([read_profile(path, 1)[0] for path in chain.end_profiles().values()])
        chain.close()
        measured = float(in_use.max() - in_use.min())
        assert formula.activation_bytes(batch, sequence, 4) == pytest.approx(measured, rel=0.1)
