"""Parameters that are updated as soon as the backward pass of a chain has their gradients."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.inputs import check_batch, model_inputs
from edgepeft.runtime.memory.planner import plans
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.starting import trained_names
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.workload import workload

from .. import models
from ..interrupting import resumed, same_tensors

Switched = Callable[[str], Path]

#: A norm that no gradient has: nothing is clipped, but all gradients are waited for.
NEVER_REACHED = 1e9


def data_of(kind: str) -> list[dict[str, Any]]:
    """Something to learn: labels that follow the tokens, tokens that follow each other."""
    if kind == "classifier":
        return [
            {"input_ids": [3 + index % 3] * 8 + [10 + index] * 4, "label": index % 3} for index in range(24)
        ]
    return [{"input_ids": [(3 * index + place) % 40 + 10 for place in range(12)]} for index in range(24)]


@pytest.mark.parametrize("optimizer_state", ["32bit", "8bit"])
@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_an_update_has_the_bits_of_one_that_keeps_its_gradients(
    switched: Switched, kind: str, optimizer_state: str, tmp_path: Path
) -> None:
    """Also where it was interrupted."""
    options: dict[str, Any] = {
        "strategy": "streamed",
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "seq_len": 16,
        "optimizer_state": optimizer_state,
    }
    with edgepeft.load(switched(kind), threads=1) as device:
        kept = device.adapt(data_of(kind), tmp_path / "kept", max_grad_norm=NEVER_REACHED, **options)
        options["max_grad_norm"] = 0.0
        passed = device.adapt(data_of(kind), tmp_path / "passed", **options)
        again = resumed(device, data_of(kind), tmp_path / "again", at=5, **options)
    assert "updated stage by stage" in passed.strategy
    assert "updated stage by stage" not in kept.strategy
    assert kept.chosen == "trained"
    assert passed.losses == kept.losses == again.losses
    assert passed.grad_norms == pytest.approx(kept.grad_norms, rel=1e-6)
    assert same_tensors(tmp_path / "passed", tmp_path / "kept")
    assert same_tensors(tmp_path / "again", tmp_path / "kept")


def test_stepping_down_goes_on_stage_by_stage(
    switched: Switched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From gradients that are kept, through stages in memory, to a state in a file."""
    options: dict[str, Any] = {"steps": 12, "batch_size": 4, "learning_rate": 5e-3, "seq_len": 16}
    with edgepeft.load(switched("decoder"), threads=1) as device:
        kept = device.adapt(data_of("decoder"), tmp_path / "kept", max_grad_norm=NEVER_REACHED, **options)
    monkeypatch.setattr("edgepeft.runtime.training.adapt.NEAR", 0.0)
    with edgepeft.load(switched("decoder"), memory_budget="4GiB", threads=1) as device:
        passed = device.adapt(data_of("decoder"), tmp_path / "passed", max_grad_norm=0.0, **options)
    ways = [change.after for change in passed.stepped_down]
    assert ways[0].startswith("checkpointed")
    assert ways[-1].startswith("streamed, state in a file, updated stage by stage")
    assert passed.losses == pytest.approx(kept.losses, rel=1e-5)


def taken_from(
    bundle_path: Path, batch: models.Batch
) -> tuple[list[list[str]], dict[str, np.ndarray], dict[str, np.ndarray], list[set[str]]]:
    """What a chain hands over stage by stage: names, gradients, those of a state that keeps them, and the
    names of what the state had at each time."""
    bundle = open_bundle(bundle_path)
    inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
    rng = np.random.default_rng(0)
    start = {
        name: 0.1 * rng.standard_normal(inputs[name].shape, np.float32)
        for name in bundle.manifest.policy.trainable
    }
    kept, passing = TrainingState(start), TrainingState(start, passing=True)
    chain = Chain(bundle, {**inputs, **start})
    specs = model_inputs(bundle.manifest, bundle.manifest.graphs["train"].inputs)
    arrays = check_batch(bundle.manifest, specs, batch.arrays)
    chain.gradients(arrays, kept)
    order: list[list[str]] = []
    there: list[set[str]] = []
    got: dict[str, np.ndarray] = {}

    def take(names: Collection[str]) -> None:
        order.append(list(names))
        got.update({name: passing.gradients[name].copy() for name in names})
        there.append({name for name in start if passing.gradients[name].any()})
        passing.drop_gradients(names)

    chain.gradients(arrays, passing, take)
    chain.close()
    return order, got, dict(kept.gradients), there


def test_a_stage_at_a_time_is_there(switched: Switched) -> None:
    """From the last to the first, each with the gradients of its own."""
    order, got, kept, there = taken_from(switched("decoder"), models.batch(labels="tokens"))
    assert [{name.split(".layers.")[1][0] for name in names} for names in order] == [{"1"}, {"0"}]
    assert [set(names) for names in order] == there
    assert got.keys() == kept.keys()
    for name, expected in kept.items():
        np.testing.assert_array_equal(got[name], expected)


def test_what_layers_share_waits_for_the_lowest(tmp_path: Path) -> None:
    """ALBERT's layers are one layer: its LoRA has a gradient from each of them."""
    config = transformers.AlbertConfig(**models.SIZES, max_position_embeddings=64, num_labels=3)
    model = transformers.AlbertForSequenceClassification(config).eval()
    edgepeft.export(model, tmp_path / "bundle", bits=32, rank=2, targets=["query", "value"], verify=False)
    order, got, kept, _ = taken_from(tmp_path / "bundle", models.batch(labels=3))
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.partition is not None
    uses = [key for stage in manifest.partition.stages_and_head for key in stage.adapter.values()]
    shared = {key for key in uses if uses.count(key) > 1}
    assert shared
    assert sorted(name for names in order for name in names) == sorted(kept)
    for name, expected in kept.items():
        np.testing.assert_array_equal(got[name], expected)


def test_the_plan_leaves_the_gradients_out(switched: Switched) -> None:
    bundle = open_bundle(switched("decoder"))
    adapter = bundle.adapter("default")
    found: dict[str, list[int]] = {}
    for limit in (0.0, 1.0):
        options = TrainingOptions(max_grad_norm=limit)
        names = trained_names(bundle.manifest, adapter, options)
        sizes = workload(adapter, names, 8, 16, options)
        for plan in plans(bundle.manifest, sizes, 0):
            found.setdefault(f"{plan.strategy} {plan.state_in_file} {plan.held.stride}", []).append(
                plan.state_bytes
            )
    passing_bytes = 2 * 4 * sizes.trained_values // len(bundle.manifest.partition.stages)  # type: ignore[union-attr]
    for way, (passed, kept) in found.items():
        in_memory = way.startswith(("checkpointed", "streamed False"))
        assert kept - passed == (4 * sizes.trained_values - passing_bytes if in_memory else 0), way
