"""A technique that one file adds (`tests/techniques/bias_vector.py`): all that a bundle does, it does too."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import edgepeft
from edgepeft import cli
from edgepeft.adapters import PREFIX, Adapter, load_adapter, save_adapter
from edgepeft.bundle.adapter_store import add_adapter
from edgepeft.bundle.manifest import DECODER
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.writer import MANIFEST_FILE
from edgepeft.errors import AdapterError, BudgetError, BundleError, ExportError, UpdateRejectedError
from edgepeft.exporters.measure import probe
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.inputs import check_batch, model_inputs
from edgepeft.runtime.memory.inference import STREAMED
from edgepeft.runtime.model import Model
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.gradients.strategies import GradientSession
from edgepeft.runtime.training.state.buffers import TrainingState

from ...techniques import bias_vector
from .. import models, sharing, zoo
from ..partition.test_streamed_inference import too_little, with_memory

ROOT = Path(__file__).parents[3]
TARGETS = {
    "bert": ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"],
    "llama": ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"],
}
BITS = {"bert": 32, "llama": 4}
RECORDS = [{"input_ids": [3 + i % 3, 9, 11 + i], "label": i % 3} for i in range(12)]
Make = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def _added() -> Iterator[None]:
    """This process knows the technique, and so does the one that measures memory."""

    def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        program = (
            f"from {bias_vector.__name__} import added\nfrom {probe.__name__} import main\nwith added(): main()"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [command[0], "-c", program, *command[3:]], env=environment, check=False, **{**options, "check": False}
        )

    with bias_vector.added(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "subprocess", SimpleNamespace(run=run))
        yield


def adapter(family: str, seed: int = 1, modules: Sequence[str] | None = None) -> Adapter:
    """Random vectors on `TARGETS`, or on other modules."""
    rng, model = np.random.default_rng(seed), zoo.build(family)
    chosen = TARGETS[family] if modules is None else modules
    tensors = {
        f"{PREFIX}{module}.shift": rng.standard_normal(model.get_submodule(module).out_features, np.float32)
        for module in chosen
    }
    return Adapter({"peft_type": "BIAS_VECTOR", "target_modules": list(chosen)}, tensors, "toy")


@pytest.fixture(scope="module")
def bundle(shared: sharing.Shared) -> Make:
    """`bundle(family)`: with the adapter `toy`, memory measured."""

    def make(family: str) -> Path:
        def write(root: Path) -> None:
            root.mkdir()
            save_adapter(adapter(family), root / "toy")
            with sharing.measured():
                edgepeft.export(
                    *(zoo.build(family), root / "b"),
                    bits=BITS[family],
                    block_size=zoo.BLOCK_SIZE,
                    adapters={"toy": root / "toy"},
                    verify=False,
                )

        return shared(f"toy/{family}", write) / "b"

    return make


def batch(family: str) -> models.Batch:
    return models.batch(labels=3 if family == "bert" else "tokens")


def torch_model(opened: Bundle, family: str, own: Adapter) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The model on the bundle's weights, with a hook that adds each vector, and the vectors by key."""
    model = zoo.build(family)
    models.use_reference(model, models.read_reference(opened.path, opened.manifest))
    vectors = {key: torch.nn.Parameter(torch.from_numpy(value)) for key, value in own.tensors.items()}
    for key, vector in vectors.items():
        module = model.get_submodule(key.removeprefix(PREFIX).removesuffix(".shift"))
        module.register_forward_hook(lambda _module, _given, output, vector=vector: output + vector)
    return model, vectors


@pytest.mark.parametrize("family", TARGETS)
def test_outputs_and_gradients_are_those_of_the_formula(bundle: Make, family: str) -> None:
    """Of the one graph and of the stages, against PyTorch with the vectors added by hand."""
    opened = open_bundle(bundle(family))
    own, given = opened.adapter("toy"), batch(family)
    model, vectors = torch_model(opened, family, own)
    output = model(**given.tensors)
    output.loss.backward()
    arrays = {name: value for name, value in given.arrays.items() if name != "labels"}
    counted = arrays["attention_mask"] == 1 if family == "llama" else ...
    expected = output.logits.detach().numpy()[counted]
    with edgepeft.load(opened.path) as device:
        plain, shifted = (next(iter(device.forward(arrays, name).values()))[counted] for name in (None, "toy"))
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(plain - shifted).max() > 0.01

    manifest = opened.manifest
    assert set(manifest.policy.trainable) >= vectors.keys()
    inputs = graph_inputs(opened, [(own, 1.0)])
    fed = check_batch(manifest, model_inputs(manifest, manifest.graphs["train"].inputs), given.arrays)
    start = {name: inputs[name] for name in vectors}
    resident, staged = TrainingState(start), TrainingState(start)
    graph = GradientSession(opened, "train", inputs, resident)
    chain = Chain(opened, {**inputs, **staged.parameters})
    losses = [graph.run(fed), chain.gradients(fed, staged)]
    graph.close()
    chain.close()
    assert losses == pytest.approx([output.loss.item()] * 2, rel=1e-4)
    for key, vector in vectors.items():
        assert vector.grad is not None
        for state in (resident, staged):
            np.testing.assert_allclose(state.gradients[key], vector.grad, rtol=0, atol=1e-4 * vector.grad.abs().max())


def trained(path: Path, folder: Path, strategy: str, **options: Any) -> tuple[dict[str, Any], Adapter | None]:
    """The report of an update, and the adapter where it was kept."""
    options = {"steps": 6, "batch_size": 4, "seq_len": 8, "learning_rate": 3e-2, "adapter": "toy"} | options
    with edgepeft.load(path, memory_budget=too_little()) as device:
        try:
            return device.adapt(RECORDS, folder, strategy=strategy, **options).to_dict(), load_adapter(folder)
        except UpdateRejectedError as error:
            return error.report, None


@pytest.mark.parametrize("family", TARGETS)
def test_every_strategy_trains_it_in_a_budget(bundle: Make, family: str, tmp_path: Path) -> None:
    """Resident, checkpointed and streamed learn the same, whose adapter gives the same when it is loaded again; a
    budget that holds none is refused."""
    path = bundle(family)
    losses, kept = {}, {}
    for strategy in ("resident", "checkpointed", "streamed"):
        report, kept[strategy] = trained(path, tmp_path / strategy, strategy)
        assert report["strategy"].startswith(strategy)
        assert report["memory"]["measured_peak_bytes"] <= report["memory"]["budget_bytes"]
        losses[strategy] = report["losses"]
    assert losses["resident"][-1] < losses["resident"][0]
    for strategy in ("checkpointed", "streamed"):
        np.testing.assert_allclose(losses[strategy], losses["resident"], rtol=1e-4)
    ...
