"""What is refused of ONNX files that other tools wrote, and how wrong gradients are told."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import edgepeft
from edgepeft.exporters.autodiff.rules import quantized as quantized_rules
from edgepeft.exporters.sources.onnx_file import load_onnx_file
from edgepeft.exporters.verify import finite_differences


def test_a_target_that_matches_nothing_lists_the_linears(
    files: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        edgepeft.ExportError, match="'nonesuch' is not a linear of this model: it has down_proj"
    ):
        edgepeft.export(files("llama-script"), tmp_path / "b", targets=["nonesuch"])
    assert not (tmp_path / "b").exists()


def test_bits_for_a_quantized_file(files: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(edgepeft.UsageError, match="quantized already"):
        edgepeft.export(files("llama-q4-asymmetric"), tmp_path / "b", bits=8)


def test_another_task(files: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(edgepeft.UsageError, match=r"logits \[batch,3\]"):
        edgepeft.export(files("bert-dynamo"), tmp_path / "b", task="text-generation")
    with pytest.raises(edgepeft.UsageError, match="--labels names 2 classes, the file's logits have 3"):
        edgepeft.export(files("bert-dynamo"), tmp_path / "b", labels=["a", "b"])


def test_a_wrong_gradient_is_refused(
    files: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five percent too large: the central differences see it."""
    right = quantized_rules._dequantized
    monkeypatch.setattr(quantized_rules, "_dequantized", lambda c: c.emit.scale(right(c), 1.05))
    with pytest.raises(edgepeft.VerificationError, match="central differences of the loss give"):
        edgepeft.export(files("llama-q4-asymmetric"), tmp_path / "b", rank=2, targets=["q_proj"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        (
            "config.json",
            '{"num_hidden_layers": "two"}',
            "has num_hidden_layers 'two', expected a whole number",
        ),
        ("config.json", '{"pad_token_id": "[PAD]"}', r"has pad_token_id '\[PAD\]', expected a whole number"),
        ("config.json", '{"eos_token_id": [2, "3"]}', "has eos_token_id .* expected a whole number"),
        ("config.json", '{"a": ' + "[" * 20_000, "config.json: cannot be read as JSON"),
        ("genai_config.json", '{"model": [1]}', "genai_config.json: model and its decoder are to be objects"),
    ],
)
def test_a_damaged_configuration_beside_a_file_is_named(
    files: Callable[[str], Path], tmp_path: Path, name: str, text: str, match: str
) -> None:
    model = Path(shutil.copy(files("llama-script"), tmp_path / "model.onnx"))
    (tmp_path / name).write_text(text)
    with pytest.raises(edgepeft.ExportError, match=match):
        load_onnx_file(model)


@pytest.mark.parametrize("location", ["../weights.data", "/etc/hostname", "linked.data"])
def test_external_data_stays_in_the_folder(
    files: Callable[[str], Path], tmp_path: Path, location: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = onnx.load(files("llama-script"))
    onnx.save(
        model, folder / "m.onnx", save_as_external_data=True, location="weights.data", size_threshold=1024
    )
    (folder / "weights.data").rename(tmp_path / "weights.data")
    (folder / "linked.data").symlink_to(tmp_path / "weights.data")
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(edgepeft.ExportError, match="outside the file's folder"):
        edgepeft.export(folder / "m.onnx", tmp_path / "b")


def test_external_data_beside_the_file(files: Callable[[str], Path], tmp_path: Path) -> None:
    """At an old opset, so that the converter has seen it too."""
    inside = tmp_path / "m.onnx"
    onnx.save(
        onnx.load(files("llama-script")),
        inside,
        save_as_external_data=True,
        location="weights.data",
        size_threshold=0,
    )
    apart, whole = load_onnx_file(inside), load_onnx_file(files("llama-script"))
    assert apart.weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        assert torch.equal(apart.weights[name], value), name


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(edgepeft.ExportError, match="no such file"):
        edgepeft.export(tmp_path / "missing.onnx", tmp_path / "b")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(edgepeft.ExportError, match="cannot be read as an ONNX model"):
        edgepeft.export(tmp_path / "text.onnx", tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        (lambda g: g, True),
        (lambda g: 1.02 * g, False),
        (lambda g: np.where(np.arange(g.size).reshape(g.shape) % 2, g, 0), False),
        (lambda g: g[::-1], False),
        (lambda g: -g, False),
    ],
    ids=["right", "2% too large", "half missing", "permuted", "negated"],
)
def test_central_differences_tell_wrong_gradients(change: Callable[..., np.ndarray], agrees: bool) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((2, 12, 16)).astype(np.float32)

    def loss(changed: Any) -> float:
        return float(np.log(np.exp(changed.get("w", weight) * x * 0.3).sum(dtype=np.float64)))

    exponentials = np.exp(weight * x * 0.3)
    gradient = 0.3 * x * exponentials / exponentials.sum()
    (found,) = finite_differences.compare(loss, {"w": weight}, {"w": change(gradient)})
    assert found.resolved
    assert (found.relative <= finite_differences.TOLERANCE) == agrees
