"""Losses that are asked for: triplets, and a penalty on drifting from the base model; against PyTorch."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import edgepeft
from edgepeft.errors import UsageError
from edgepeft.exporters.graph import INT64, graph_input, new_model, tidy
from edgepeft.exporters.losses import loss_for, with_drift
from edgepeft.exporters.losses.triplet import triplet_loss

from .. import models, task_models


def _run(graph: ir.Graph, scalar: ir.Value, feeds: dict[str, np.ndarray]) -> float:
    model = new_model(graph)
    graph.outputs.append(scalar)
    tidy(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return float(session.run(None, feeds)[0])


@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_the_triplet_loss_is_pytorchs(spread: float) -> None:
    """Where the margin holds for none, and where it holds for some."""
    rng = np.random.default_rng(0)
    embedding = spread * rng.standard_normal((12, 5), np.float32)
    graph = ir.Graph([], [], nodes=[], name="g")
    value = triplet_loss(graph, graph_input(graph, "x", ["batch", 5]))
    expected = torch.nn.functional.triplet_margin_loss(*torch.from_numpy(embedding).chunk(3), margin=5.0)
    assert _run(graph, value, {"x": embedding}) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("lead", [("batch",), ("batch", "sequence")], ids=["classes", "tokens"])
def test_a_drift_penalty_is_added_to_the_tasks_loss(lead: tuple[str, ...]) -> None:
    """Weight 0 leaves the loss as it is; the base's own logits cost nothing; padding does not count."""
    rng = np.random.default_rng(0)
    sizes = [3] if len(lead) == 1 else [3, 4]
    task = "text-classification" if len(lead) == 1 else "text-generation"
    problem = "single_label_classification" if len(lead) == 1 else None
    logits, base = (2 * rng.standard_normal((*sizes, 6), np.float32) for _ in range(2))
    feeds = {"logits": logits, "base_logits": base, "labels": rng.integers(0, 6, sizes)}
    mask = np.ones(sizes, np.int64)
    if len(lead) == 2:
        mask[1, 2:] = 0
        feeds["attention_mask"] = mask
    own = loss_for(task, problem)

    def value(**changed: np.ndarray) -> float:
        graph = ir.Graph([], [], nodes=[], name="g")
        x = graph_input(graph, "logits", [*lead, 6])
        if len(lead) == 2:
            graph_input(graph, "attention_mask", lead, INT64)  # the model's own, which the loss shares
        return _run(graph, with_drift(own, lead).build(graph, x), {**feeds, **changed})

    def weight(number: float) -> np.ndarray:
        return np.array(number, np.float32)

    plain = value(drift_weight=weight(0))
    assert value(drift_weight=weight(1), base_logits=logits) == pytest.approx(plain, abs=1e-6)
    p, q = (torch.log_softmax(torch.from_numpy(z).double(), -1) for z in (base, logits))
    each = (p.exp() * (p - q)).sum(-1)[torch.from_numpy(mask).bool()]
    penalized = value(drift_weight=weight(0.5))
    assert penalized - plain == pytest.approx(0.5 * each.mean().item(), rel=1e-5)


def test_a_loss_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no loss 'triplet'"):
        edgepeft.export(models.bert_classifier(), tmp_path / "b", loss="triplet", rank=2)
    with pytest.raises(UsageError, match="compares logits"):
        edgepeft.export(models.bert_encoder(), tmp_path / "b", drift_penalty=True, rank=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("measured")
def test_triplets_are_exported_and_learned(tmp_path: Path) -> None:
    """Gradients equal PyTorch's (the export verifies that); training brings negatives away from anchors."""
    manifest = edgepeft.export(models.bert_encoder(), tmp_path / "b", bits=32, rank=4, loss="triplet")
    assert manifest.verification["gradients"]["default"]["smallest_cosine"] >= 0.9999
    rng = np.random.default_rng(0)
    words = rng.integers(3, 300, (40, 6)).tolist()
    records = [{"anchor": a, "positive": a[:5], "negative": words[39 - i]} for i, a in enumerate(words[:20])]
    with edgepeft.load(tmp_path / "b") as device:
        report = device.adapt(records, tmp_path / "new", steps=40, batch_size=4, learning_rate=5e-3)
    assert report.held_out_after.loss < report.held_out_before.loss
    with (
        edgepeft.load(tmp_path / "b") as device,
        pytest.raises(edgepeft.errors.DataError, match='"anchor", "positive", "negative"'),
    ):
        device.adapt([{"anchor": [5], "positive": [6]}] * 9, tmp_path / "other", steps=1)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "classifier"])
def test_gradients_with_a_drift_penalty_equal_pytorchs(kind: str, tmp_path: Path) -> None:
    model = {
        "decoder": lambda: models.llama(tied=True),
        "encoder-decoder": task_models.t5,
        "classifier": models.bert_classifier,
    }[kind]()
    manifest = edgepeft.export(model, tmp_path / "b", rank=4, block_size=16, drift_penalty=True)
    figures = manifest.verification["gradients"]["default"]
    assert figures["smallest_cosine"] >= 0.9999
    assert figures["largest_norm_difference"] <= 1e-3
    assert {"base_logits", "drift_weight"} <= {item.name for item in manifest.graphs["train"].inputs}


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_a_heavier_penalty_keeps_the_model_closer(tmp_path: Path) -> None:
    edgepeft.export(models.bert_classifier(), tmp_path / "b", bits=32, rank=4, drift_penalty=True)
    rng = np.random.default_rng(0)
    records = [
        {"input_ids": [10 + label] * 3 + rng.integers(20, 300, 3).tolist(), "label": label}
        for label in [0, 1, 2] * 8
    ]
    moved = []
    with edgepeft.load(tmp_path / "b", memory_budget="2GiB") as device:
        batch = {"input_ids": np.array([record["input_ids"] for record in records])}
        base = device.forward(batch)["logits"]
        for weight in (0.0, 10.0):
            folder = tmp_path / f"at-{weight}"
            device.adapt(records, folder, steps=20, learning_rate=3e-3, drift_weight=weight)
            moved.append(float(np.abs(device.forward(batch, adapter=folder)["logits"] - base).mean()))
    assert moved[1] < 0.5 * moved[0]
