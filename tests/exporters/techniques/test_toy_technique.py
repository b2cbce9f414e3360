"""A technique that tests add (`tests/techniques/bias_vector.py`): all that a bundle does, it does too."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from click.testing import CliRunner, Result

import edgepeft
from edgepeft import cli
from edgepeft.adapters import PREFIX, Adapter, load_adapter, save_adapter
from edgepeft.bundle.adapter_store import add_adapter
from edgepeft.bundle.decoder_validation import check_decoder
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.writer import MANIFEST_FILE
from edgepeft.errors import AdapterError, BudgetError, BundleError, UpdateRejectedError, UsageError
from edgepeft.exporters.measure import processes
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.adapters.onnx_adapter import read_onnx_adapter
from edgepeft.runtime.inputs import check_batch, model_inputs
from edgepeft.runtime.memory.inference import STREAMED
from edgepeft.runtime.model import Model
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.gradients.strategies import GradientSession
from edgepeft.runtime.training.starting import fresh_adapter
from edgepeft.runtime.training.state.buffers import TrainingState

from ...techniques import bias_vector, bias_vector_graph
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
    """This process knows the technique, and so do those that measure memory."""

    def popen(command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        python, _, module, *arguments = command
        program = f"from {bias_vector.__name__} import added\nfrom {module} import main\nwith added(): main()"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([python, "-c", program, *arguments], env=environment, **options)

    with bias_vector_graph.added(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
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
def test_outputs_and_gradients_are_those_of_the_formula(family: str, bundle: Make) -> None:
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
        plain, shifted = (
            next(iter(device.forward(arrays, name).values()))[counted] for name in (None, "toy")
        )
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
            np.testing.assert_allclose(
                state.gradients[key], vector.grad, rtol=0, atol=1e-4 * vector.grad.abs().max()
            )


def trained(path: Path, folder: Path, strategy: str, **options: Any) -> tuple[dict[str, Any], Adapter | None]:
    """The report of an update, and the adapter where it was kept."""
    options = {"steps": 6, "batch_size": 4, "seq_len": 8, "learning_rate": 3e-2, "adapter": "toy"} | options
    with edgepeft.load(path, memory_budget=too_little()) as device:
        try:
            return device.adapt(RECORDS, folder, strategy=strategy, **options).to_dict(), load_adapter(folder)
        except UpdateRejectedError as error:
            return error.report, None


@pytest.mark.parametrize("family", TARGETS)
def test_every_strategy_trains_it_in_a_budget(family: str, bundle: Make, tmp_path: Path) -> None:
    """Resident, checkpointed and streamed learn the same; a budget that holds none is refused."""
    path = bundle(family)
    losses = {}
    for strategy in ("resident", "checkpointed", "streamed"):
        report, kept = trained(path, tmp_path / strategy, strategy)
        assert report["strategy"].startswith(strategy)
        assert report["memory"]["measured_peak_bytes"] <= report["memory"]["budget_bytes"]
        assert kept is not None
        assert kept.tensors.keys() >= adapter(family).tensors.keys()
        assert any((kept.tensors[key] != value).all() for key, value in adapter(family).tensors.items())
        losses[strategy] = report["losses"]
    np.testing.assert_allclose(losses["checkpointed"], losses["resident"], rtol=1e-4)
    np.testing.assert_allclose(losses["streamed"], losses["checkpointed"], rtol=1e-6)
    with edgepeft.load(path, memory_budget="1MiB") as device, pytest.raises(BudgetError, match="at least"):
        device.adapt(RECORDS, tmp_path / "small", adapter="toy", steps=1, seq_len=8)


@pytest.mark.parametrize("family", TARGETS)
def test_a_plan_is_above_what_is_measured(family: str, bundle: Make) -> None:
    """The process that measures memory knows the technique, and counts what it needs."""
    manifest = open_bundle(bundle(family)).manifest
    assert manifest.streamed_inference is not None
    for formula in (
        manifest.inference_memory,
        manifest.streamed_inference.memory,
        *(strategy.memory for strategy in manifest.strategies),
    ):
        assert formula.arena_bytes(8, 64, 0) > 8 * 64 * 64 * 4  # at least a hidden state
        assert formula.arena_bytes(8, 64, 0) == formula.arena_bytes(8, 64, 16)


@pytest.mark.parametrize("family", TARGETS)
def test_inference_is_streamed_where_the_budget_holds_no_more(family: str, bundle: Make) -> None:
    """With the adapter, which has no rank, and not as the base alone."""
    opened = open_bundle(bundle(family))
    given = {name: value for name, value in batch(family).arrays.items() if name != "labels"}
    counted = given["attention_mask"] == 1 if family == "llama" else ...
    small = dataclasses.replace(opened, manifest=with_memory(opened.manifest))
    with Model(opened, threads=1) as whole, Model(small, too_little(), threads=1) as model:
        expected, got = (next(iter(item.forward(given, "toy").values()))[counted] for item in (whole, model))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        if family == "llama":
            told = [item.generate_ids([5, 6, 7], "toy", max_new_tokens=8) for item in (whole, model)]
            assert told[0] == told[1] != whole.generate_ids([5, 6, 7], max_new_tokens=8)
        assert set(model._sessions._open) == {STREAMED}


def test_the_decoder_graph_takes_it(bundle: Make, tied_llama: Path) -> None:
    """Adapted and plain, which has no LoRA; a manifest whose decoder leaves a slot out, and would run without
    the adapter, is refused."""
    opened = open_bundle(bundle("llama"))
    decoder = opened.manifest.decoder
    assert decoder is not None
    assert opened.manifest.missing == {}
    own = set(opened.adapter("toy").tensors)
    for role in (decoder.graph, decoder.plain_graph):
        assert own <= {spec.name for spec in opened.manifest.graphs[role].inputs}
    with edgepeft.load(opened.path) as device:
        decoded = device.generate_ids([5, 6, 7], "toy", max_new_tokens=8)
    without = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, decoder=None))
    with Model(without, threads=1) as model:
        assert model.generate_ids([5, 6, 7], "toy", max_new_tokens=8) == decoded
        assert model.generate_ids([5, 6, 7], max_new_tokens=8) != decoded
    packed = open_bundle(tied_llama).manifest
    assert packed.decoder is not None
    slots = (*packed.slots, bias_vector.new_slot("lm_head", 320))
    with pytest.raises(BundleError, match=r"and its wiring differ in the input .*lm_head"):
        check_decoder(dataclasses.replace(packed, slots=slots), packed.decoder)


def test_a_saved_adapter_is_the_same_when_it_is_loaded(bundle: Make, tmp_path: Path) -> None:
    """By its folder, added to the bundle, and through onnxruntime's format."""
    path = tmp_path / "b"
    shutil.copytree(bundle("bert"), path)
    report, kept = trained(path, tmp_path / "new", "resident")
    assert report["losses"]
    assert kept is not None
    given = {name: value for name, value in batch("bert").arrays.items() if name != "labels"}
    assert run("adapter", "add", path, f"new={tmp_path / 'new'}").exit_code == 0
    assert run("adapter", "export", path, "new", "-o", tmp_path / "new.onnx_adapter").exit_code == 0
    assert run("adapter", "add", path, f"again={tmp_path / 'new.onnx_adapter'}").exit_code == 0
    with edgepeft.load(path) as device:
        names = (tmp_path / "new", "new", "again", "toy")
        outputs = [next(iter(device.forward(given, name).values())) for name in names]
    for got in outputs[1:3]:
        np.testing.assert_array_equal(got, outputs[0])
    assert np.abs(outputs[3] - outputs[0]).max() > 1e-3
    again = load_adapter(path / "adapters" / "again")
    assert again.config["peft_type"] == "BIAS_VECTOR"
    assert sorted(again.config["target_modules"]) == sorted(TARGETS["bert"])
    assert again.tensors.keys() == kept.tensors.keys()


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_it_is_listed(bundle: Make) -> None:
    inspected = json.loads(run("inspect", bundle("bert"), "--json").stdout)
    assert (inspected["lora_slots"], inspected["other_slots"]) == (0, {"bias vector": 2})
    assert inspected["adapters"]["toy"] | {"base": None} == {
        "technique": "bias_vector",
        "rank": 0,
        "parameters": 128,
        "modules": 2,
        "in_manifest": True,
        "base": None,
    }
    text = run("inspect", bundle("bert")).stdout
    assert "0 linear modules; 2 of bias vector; saved: classifier.weight, classifier.bias" in text
    assert "toy: bias_vector on 2 modules, 128 parameters" in text
    (listed,) = json.loads(run("adapter", "list", bundle("bert"), "--json").stdout)
    assert (listed["technique"], listed["ranks"], listed["modules"]) == ("bias_vector", [], 2)
    assert re.search(
        r"^toy +bias_vector +2 \+ 0 saved", run("adapter", "list", bundle("bert")).stdout, re.MULTILINE
    )
    planned = run("plan", bundle("bert"), "--budget", "4GiB", "--seq-len", "16", "--json")
    assert json.loads(planned.stdout)["chosen"] == "resident"


def test_a_fresh_one_begins_without_effect(bundle: Make, tmp_path: Path) -> None:
    """And learns; LoRA's own parts cannot be chosen."""
    opened = open_bundle(bundle("bert"))
    fresh = fresh_adapter(opened, 1, 0)
    assert fresh.config["peft_type"] == "BIAS_VECTOR"
    assert fresh.modules == tuple(TARGETS["bert"])
    assert not any(value.any() for key, value in fresh.tensors.items() if key.endswith(".shift"))
    with pytest.raises(AdapterError, match="has no effect: every shift is zero and no saved module differs"):
        add_adapter(opened, "fresh", fresh, lambda _: None)
    fresh = {"adapter": None, "rank": 1}
    report, kept = trained(opened.path, tmp_path / "new", "streamed", trainable="bias_vector", **fresh)
    assert kept is None or any(value.any() for key, value in kept.tensors.items() if key.endswith(".shift"))
    assert report["losses"]
    with pytest.raises(UsageError, match="nothing to train: with trainable='lora'"):
        trained(opened.path, tmp_path / "other", "streamed", trainable="lora", **fresh)


def test_it_is_refused_where_it_does_not_fit(bundle: Make, tmp_path: Path) -> None:
    opened, right = open_bundle(bundle("bert")), adapter("bert")
    first = f"{PREFIX}{TARGETS['bert'][0]}.shift"
    elsewhere = "bert.encoder.layer.0.output.dense"

    def refused(tensors: dict[str, Any], message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            opened.check_fit(right.with_tensors(tensors, "mine"))

    refused(
        right.tensors | {first: np.ones(63, np.float32)}, r"shift is \[63\] in the adapter, \[64\] in this"
    )
    refused(right.tensors | {first: np.ones((64, 1), np.float32)}, r"shift is \[64, 1\] in the adapter")
    refused(
        {f"{PREFIX}{elsewhere}.shift": np.ones(64, np.float32)},
        f"module {elsewhere} takes no bias vector in this bundle \\(2 modules do",
    )
    lora = models.save_adapter(zoo.build("bert"), tmp_path / "lora", 1, r=2, target_modules=["query"])
    with pytest.raises(AdapterError, match=r"takes no LoRA in this bundle \(0 modules do: none\)"):
        opened.check_fit(load_adapter(lora))
    with pytest.raises(
        AdapterError, match=r"peft_type is 'bias_vector', edgepeft runs .*LORA, .*BIAS_VECTOR"
    ):
        Adapter(right.config | {"peft_type": "bias_vector"}, right.tensors)

    folder = tmp_path / "unknown"
    folder.mkdir()
    save_adapter(right.with_tensors({f"{PREFIX}bert.nowhere.shift": np.ones(64, np.float32)}, ""), folder)
    with pytest.raises(AdapterError, match=r"module bert\.nowhere is no linear of"):
        edgepeft.export(zoo.build("bert"), tmp_path / "b", adapters={"toy": folder}, verify=False)


def test_a_manifest_whose_slot_is_none_of_its_technique_is_refused(bundle: Make, tmp_path: Path) -> None:
    shutil.copytree(bundle("bert"), tmp_path / "b")
    file = tmp_path / "b" / MANIFEST_FILE
    data = json.loads(file.read_text())
    data["slots"][0]["tensors"][0]["trains"] = False
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="bias_vector: has trains False for shift, expected True"):
        open_bundle(tmp_path / "b")


def test_mixtures_and_rows_that_it_does_not_define_are_refused(bundle: Make, tmp_path: Path) -> None:
    save_adapter(adapter("bert", seed=2), tmp_path / "other")
    arrays = {name: value for name, value in batch("bert").arrays.items() if name != "labels"}
    with edgepeft.load(bundle("bert")) as device:
        device.load_adapter("other", tmp_path / "other")
        (own,) = device.forward(arrays, "toy").values()
        for mixture in ({"toy": 0.5}, {"toy": 1.0, "other": 1.0}):
            with pytest.raises(
                AdapterError, match="bias vector of several adapters, or with a weight, cannot be"
            ):
                device.forward(arrays, mixture)
        for other in (None, "other"):
            with pytest.raises(
                AdapterError, match="is filled once for all rows, so the rows of a batch cannot"
            ):
                device.forward(arrays, ["toy", "toy", other, "toy"])
        np.testing.assert_array_equal(next(iter(device.forward(arrays, ["toy"] * 4).values())), own)


@pytest.mark.parametrize("family", TARGETS)
def test_a_lora_and_a_vector_share_a_bundle(family: str, tmp_path: Path) -> None:
    """On one module too: each adapter computes what it does alone, and both together what both do."""
    module = TARGETS[family][0]
    lora = models.save_adapter(zoo.build(family), tmp_path / "lora", 1, r=2, target_modules=TARGETS[family])
    save_adapter(adapter(family), tmp_path / "toy")
    manifest = edgepeft.export(
        *(zoo.build(family), tmp_path / "b"),
        bits=32,
        adapters={"toy": tmp_path / "toy", "lora": lora},
        verify=False,
    )
    assert {slot.technique for slot in manifest.slots if slot.module == module} == {"lora", "bias_vector"}
    opened = open_bundle(tmp_path / "b")
    model, _ = torch_model(opened, family, opened.adapter("toy"))
    given = {name: value for name, value in batch(family).arrays.items() if name != "labels"}
    counted = given["attention_mask"] == 1 if family == "llama" else ...
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    with torch.no_grad():
        expected = [model(**tensors).logits.numpy()[counted]]
        with_lora = peft.PeftModel.from_pretrained(model, lora)
        expected.append(with_lora(**tensors).logits.numpy()[counted])
    with edgepeft.load(tmp_path / "b") as device:
        for spec, wanted in zip(("toy", {"toy": 1.0, "lora": 1.0}), expected, strict=True):
            got = next(iter(device.forward(given, spec).values()))[counted]
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    both = ort.AdapterFormat()
    values = graph_inputs(opened, [(opened.adapter("toy"), 1.0), (opened.adapter("lora"), 1.0)])
    both.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    both.export_adapter(str(tmp_path / "both.onnx_adapter"))
    with pytest.raises(
        AdapterError, match="is bias vector and LoRA at once, which PEFT's format cannot hold"
    ):
        read_onnx_adapter(opened, tmp_path / "both.onnx_adapter")
    losses = [
        trained(tmp_path / "b", tmp_path / name, "streamed", adapter=name)[0]["losses"]
        for name in ("toy", "lora")
    ]
    assert np.isfinite(losses).all()
