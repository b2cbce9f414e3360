"""Mixtures, rows with adapters of their own and onnxruntime's own adapters, against PyTorch and PEFT."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peft
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import edgepeft
from edgepeft import cli
from edgepeft.adapters import load_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError
from edgepeft.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter

from .. import models
from ..conftest import Exported
from ..sharing import Shared

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.5}
TOLERANCE = {32: 1e-4, 4: 1e-3}
#: Different ranks, target modules and scalings.
LORAS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "o_proj"], "use_rslora": True},
    "c": {"r": 7, "lora_alpha": 7, "target_modules": ["k_proj", "v_proj", "up_proj"]},
}
IDS = torch.arange(20).reshape(4, 5) % 300 + 3


def build() -> torch.nn.Module:
    return models.llama(tied=True)


@pytest.fixture(scope="module", params=[32, pytest.param(4, marks=pytest.mark.slow)])
def three(request: pytest.FixtureRequest, shared: Shared) -> Exported:
    """A decoder with three adapters."""

    def write(root: Path) -> None:
        folders = {
            name: models.save_adapter(build(), root / name, seed, task_type="CAUSAL_LM", **config)
            for seed, (name, config) in enumerate(LORAS.items(), 1)
        }
        edgepeft.export(build(), root / "bundle", bits=request.param, adapters=folders, train=False)

    root = shared(f"three/{request.param}", write)
    manifest = open_bundle(root / "bundle").manifest
    return Exported(root / "bundle", manifest, {name: root / name for name in LORAS}, build)


def peft_model(three: Exported) -> peft.PeftModel:
    """PEFT with all three adapters on the bundle's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(three.torch_model(), three.adapters["a"], "a")
        for name in ("b", "c"):
            model.load_adapter(three.adapters[name], name)
    return model.eval()


def logits_of(model: torch.nn.Module, ids: torch.Tensor = IDS) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=ids).logits.numpy())


def close(got: np.ndarray, expected: np.ndarray, bits: int) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[bits] * scale)


def test_a_mixture_of_three_is_pefts(three: Exported) -> None:
    """`add_weighted_adapter(combination_type="cat")`, one with a negative weight."""
    model = peft_model(three)
    # PEFT takes the square root of weights; a negative one stands in the sign of a linear combination only.
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mixed", combination_type="cat")
    model.set_adapter("mixed")
    with edgepeft.load(three.folder) as device:
        got = device.forward({"input_ids": IDS.numpy()}, adapter=WEIGHTS)["logits"]
        plain = device.forward({"input_ids": IDS.numpy()})["logits"]
    close(got, logits_of(model), three.manifest.quantization.bits)
    assert np.abs(got - plain).max() > 0.01


def test_four_rows_with_four_adapters_are_pefts(three: Exported) -> None:
    """Each row as PEFT computes it with its adapter alone; loaded or read from the bundle."""
    model = peft_model(three)
    expected = []
    for row, name in enumerate(("a", "b", "c")):
        model.set_adapter(name)
        expected.append(logits_of(model, IDS[row : row + 1])[0])
    with model.disable_adapter():
        expected.append(logits_of(model, IDS[3:])[0])
    rows = ["a", "b", "c", None]
    with edgepeft.load(three.folder) as device:
        device.load_adapter("b")
        got = device.forward({"input_ids": IDS.numpy()}, adapter=rows)["logits"]
        again = device.forward({"input_ids": IDS.numpy()[:2]}, adapter="c")["logits"]
    close(got, np.stack(expected), three.manifest.quantization.bits)
    model.set_adapter("c")
    close(again, logits_of(model, IDS[:2]), three.manifest.quantization.bits)


def test_rows_have_their_adapters_in_stages_too(three: Exported) -> None:
    """The streamed model reads the same inputs."""
    from edgepeft.runtime.adapters.graph_inputs import resolve, row_inputs
    from edgepeft.runtime.streamed_model import StreamedModel

    bundle = open_bundle(three.folder)
    rows = ["a", None, {"b": 0.5, "c": 2.0}, "c"]
    streamed = StreamedModel(bundle, threads=1)
    streamed.bind(row_inputs(bundle, [resolve(bundle, row) for row in rows]))
    ids = IDS.numpy().astype(np.int64)
    got = streamed.forward({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with edgepeft.load(three.folder) as device:
        expected = device.forward({"input_ids": ids}, adapter=rows)["logits"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_that_peft_saved_in_half_precision_load(
    three: Exported, tmp_path: Path, dtype: torch.dtype
) -> None:
    """As PEFT itself loads them: rounded, and computed with in float32."""
    model = peft_model(three)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(tmp_path), selected_adapters=["b"], save_embedding_layers=False)
    stored = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    reopened = peft.PeftModel.from_pretrained(three.torch_model(), tmp_path / "b").eval()
    with edgepeft.load(three.folder) as device:
        got = device.forward({"input_ids": IDS.numpy()}, adapter=tmp_path / "b")["logits"]
        full = device.forward({"input_ids": IDS.numpy()}, adapter="b")["logits"]
    close(got, logits_of(reopened), three.manifest.quantization.bits)
    assert np.abs(got - full).max() > 0


def test_adapters_are_stored_in_half_precision(three: Exported, tmp_path: Path) -> None:
    """In half the bytes; PEFT opens what was added and what was exported so."""
    bundle = tmp_path / "bundle"
    shutil.copytree(three.folder, bundle)

    def run(*arguments: object) -> None:
        result = CliRunner().invoke(cli.main, ["adapter", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    run("add", bundle, f"half={three.adapters['b']}", "--dtype", "float16")
    run("export", bundle, "b", "-o", tmp_path / "half", "--dtype", "float16")
    run("export", bundle, "half", "-o", tmp_path / "again", "--dtype", "float32")
    run("export", bundle, "b", "-o", tmp_path / "b.onnx_adapter")
    run("add", bundle, f"converted={tmp_path / 'b.onnx_adapter'}", "--dtype", "float16")
    file = "adapter_model.safetensors"
    added, exported, whole = (
        safetensors.torch.load_file(folder / file)
        for folder in (bundle / "adapters" / "half", tmp_path / "half", tmp_path / "again")
    )
    original = safetensors.torch.load_file(three.adapters["b"] / file)
    assert added.keys() == exported.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(added[key], tensor.half())
        assert torch.equal(exported[key], tensor.half())
        assert torch.equal(whole[key], tensor.half().float())
    reopened = peft.PeftModel.from_pretrained(three.torch_model(), tmp_path / "half").eval()
    with edgepeft.load(bundle) as device:
        got = device.forward({"input_ids": IDS.numpy()}, adapter="half")["logits"]
        same = device.forward({"input_ids": IDS.numpy()}, adapter="converted")["logits"]
    close(got, logits_of(reopened), three.manifest.quantization.bits)
    assert np.array_equal(got, same)


def test_a_plain_onnxruntime_program_runs_an_exported_adapter(three: Exported, tmp_path: Path) -> None:
    """`LoraAdapter` fills every adapter input; only the model's own are fed."""
    path = tmp_path / "b.onnx_adapter"
    result = CliRunner().invoke(
        cli.main, ["adapter", "export", str(three.folder), "b", "-o", str(path)], catch_exceptions=False
    )
    assert result.exit_code == 0
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(three.folder)
    )
    session = ort.InferenceSession(
        (three.folder / "graphs" / "inference.onnx").read_bytes(),
        options,
        disabled_optimizers=["ConstantFolding"],
    )
    adapter = ort.LoraAdapter()
    adapter.Load(str(path))
    run_options = ort.RunOptions()
    run_options.add_active_adapter(adapter)
    ids = IDS.numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for item in three.manifest.graphs["inference"].inputs:
        if item.name.startswith("past_key_values"):
            shape = [4 if dim == "batch" else 0 if isinstance(dim, str) else dim for dim in item.shape]
            feeds[item.name] = np.zeros(shape, np.float32)
    # The engine takes the rest from the adapter; Python's `run` alone asks that all inputs be fed before it
    # calls the engine, so there the file's parameters are fed.
    (by_engine,) = session._sess.run(["logits"], feeds, run_options)
    parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    fed = session.run_with_ort_values(["logits"], {**values, **parameters})[0].numpy()
    model = peft_model(three)
    model.set_adapter("b")
    close(by_engine, logits_of(model), three.manifest.quantization.bits)
    assert np.array_equal(fed, by_engine)


def test_onnxruntimes_format_loses_nothing(three: Exported, tmp_path: Path) -> None:
    """Values bit for bit and the scalings of every module; back in the bundle by another name."""
    bundle = open_bundle(three.folder)
    for name in LORAS:
        original = load_adapter(three.adapters[name])
        path = tmp_path / f"{name}.onnx_adapter"
        write_onnx_adapter(bundle, original, path)
        back = read_onnx_adapter(bundle, path)
        assert back.tensors.keys() == original.tensors.keys()
        assert all(np.array_equal(back.tensors[key], original.tensors[key]) for key in original.tensors)
        for module in original.modules:
            assert np.float32(back.scaling(module)) == np.float32(original.scaling(module))


def test_a_head_goes_through_onnxruntimes_format(exported: object, tmp_path: Path) -> None:
    """Ranks and alphas by pattern, and a saved module; another bundle's file is refused."""
    classifier = exported("bert-classifier", 32)  # type: ignore[operator]
    bundle = open_bundle(classifier.folder)
    path = tmp_path / "patterned.onnx_adapter"
    original = bundle.adapter("patterned")
    write_onnx_adapter(bundle, original, path)
    back = read_onnx_adapter(bundle, path)
    assert all(np.array_equal(back.tensors[key], original.tensors[key]) for key in original.tensors)
    ids = {"input_ids": IDS.numpy()}
    result = CliRunner().invoke(cli.main, ["adapter", "list", str(classifier.folder)])
    assert "saved" in result.stdout
    with edgepeft.load(classifier.folder) as device:
        expected = device.forward(ids, adapter="patterned")["logits"]
        from edgepeft.adapters import save_adapter

        save_adapter(back, tmp_path / "back")
        assert np.array_equal(device.forward(ids, adapter=tmp_path / "back")["logits"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reopened = peft.PeftModel.from_pretrained(classifier.torch_model(), tmp_path / "back").eval()
    np.testing.assert_allclose(logits_of(reopened), expected, atol=1e-4)
    encoder = open_bundle(exported("bert-encoder", 32).folder)  # type: ignore[operator]
    with pytest.raises(AdapterError, match="made for another"):
        read_onnx_adapter(encoder, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(AdapterError, match=r"is damaged or no \.onnx_adapter file"):
        read_onnx_adapter(bundle, path)
