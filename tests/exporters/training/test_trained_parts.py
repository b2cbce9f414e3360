"""Training a part of an adapter: only its B factors, only the topmost blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import UsageError
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.training.gradients.strategies import open_gradients
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.starting import trained_names
from edgepeft.runtime.training.state.buffers import TrainingState

from .. import models

Switched = Callable[[str], Path]
FAST: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "seq_len": 16,
    "eval_fraction": 0.4,
}


def data(count: int = 24) -> list[dict[str, Any]]:
    """A first token that tells the label; as text, phrases that repeat."""
    rng = np.random.default_rng(0)
    return [
        {"input_ids": [index % 3, *rng.integers(10, 20, 5).tolist()], "label": index % 3}
        for index in range(count)
    ]


def gradients_of(bundle: Bundle, names: list[str], strategy: str, kind: str) -> dict[str, np.ndarray]:
    """Gradients of these tensors at a random adapter."""
    inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
    rng = np.random.default_rng(0)
    for name in bundle.manifest.policy.trainable:
        inputs[name] = 0.1 * rng.standard_normal(inputs[name].shape, np.float32)
    state = TrainingState({name: inputs[name] for name in names})
    way = next(item for item in bundle.manifest.strategies if item.name == strategy)
    gradients = open_gradients(bundle, way, inputs, state)
    arrays = models.batch(labels="tokens" if kind == "decoder" else 3).arrays
    gradients.run({**arrays, **({} if kind == "decoder" else {"token_type_ids": 0 * arrays["input_ids"]})})
    gradients.close()
    return {name: value.copy() for name, value in state.gradients.items()}


def close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Every tensor within 1e-6 of the largest gradient's norm."""
    largest = max(np.linalg.norm(expected[name]) for name in got)
    return all(np.linalg.norm(value - expected[name]) <= 1e-6 * largest for name, value in got.items())


@pytest.mark.parametrize("strategy", ["resident", "streamed"])
@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("decoder", TrainingOptions(trainable="lora_B"), 14),
        ("decoder", TrainingOptions(top_blocks=1), 14),
        ("decoder", TrainingOptions(top_blocks=2), 28),
        ("classifier", TrainingOptions(top_blocks=1, trainable="lora_B"), 6),
    ],
)
def test_gradients_of_a_part_are_those_of_the_whole(
    switched: Switched, kind: str, options: TrainingOptions, count: int, strategy: str
) -> None:
    bundle = open_bundle(switched(kind))
    names = trained_names(bundle.manifest, bundle.adapter("default"), options)
    assert len(names) == count
    whole = gradients_of(bundle, list(bundle.manifest.policy.trainable), "resident", kind)
    assert close(gradients_of(bundle, names, strategy, kind), whole)


@pytest.mark.parametrize(
    ("options", "trains"),
    [
        ({"trainable": "lora_B"}, lambda name: "lora_B" in name),
        ({"top_blocks": 1}, lambda name: ".layer.1." in name or "classifier" in name),
        (
            {"top_blocks": 1, "trainable": "lora_B"},
            lambda name: ".layer.1." in name and "lora_B" in name,
        ),
    ],
)
def test_only_the_part_changes_and_peft_opens_the_whole(
    switched: Switched, tmp_path: Path, options: dict[str, Any], trains: Callable[[str], bool]
) -> None:
    folder = switched("classifier")
    start = open_bundle(folder).adapter("default").tensors
    with edgepeft.load(folder) as device:
        report = device.adapt(data(60), tmp_path / "out", **options, **FAST)
    trained = load_adapter(tmp_path / "out").tensors
    assert trained.keys() == start.keys()
    changed = {name for name in start if not np.array_equal(trained[name], start[name])}
    # At the first step B is zero, so A's gradient is too; after the second both have moved.
    assert changed == {name for name in start if trains(name)}
    assert report.trained_values == sum(start[name].size for name in changed)
    peft.PeftModel.from_pretrained(models.bert_classifier(), tmp_path / "out")


def test_blocks_that_are_not_there(switched: Switched, tmp_path: Path) -> None:
    """More than the model has."""
    with edgepeft.load(switched("decoder")) as device:
        with pytest.raises(UsageError, match="top_blocks is 3, the model has 2 blocks"):
            device.adapt(data(), tmp_path / "out", top_blocks=3)
        with pytest.raises(UsageError, match="top_blocks is 0"):
            device.adapt(data(), tmp_path / "out", top_blocks=0)


@pytest.mark.slow
def test_blocks_of_a_bundle_without_stages(switched: Switched, tmp_path: Path) -> None:
    with edgepeft.load(switched("seq2seq")) as device, pytest.raises(UsageError, match="has no stages"):
        device.adapt([{"prompt": [1], "completion": [2]}], tmp_path / "out", top_blocks=1)
