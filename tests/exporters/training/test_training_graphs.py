"""Losses, optimizer graphs and memory formulas against PyTorch and against the profiler's own figures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgepeft.errors import ExportError
from edgepeft.exporters.graph import append, graph_input, initializer, new_model, tidy
from edgepeft.exporters.losses import loss_for
from edgepeft.exporters.measure import tensors as memory
from edgepeft.exporters.measure.feeds import axis_sizes, sample_feeds
from edgepeft.exporters.passes.run_order import run_in_order
from edgepeft.exporters.training.joint import build_loss
from edgepeft.exporters.training.optimizer import build_adamw, build_grad_norm
from edgepeft.exporters.writer import graph_spec

from ..conftest import Exported


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def loss_graph(task: str, shape: list[int | str], problem_type: str | None = None) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], name="forward")
    new_model(graph)
    loss = loss_for(task, problem_type)
    return build_loss(loss, graph_input(graph, loss.output, shape))


def test_the_causal_loss_is_transformers() -> None:
    rng = np.random.default_rng(0)
    logits = (8 * rng.standard_normal((3, 6, 11))).astype(np.float32)
    labels = rng.integers(0, 11, (3, 6))
    labels[0, :4] = -100
    labels[1] = -100
    model = loss_graph("text-generation", ["batch", "sequence", 11])
    got = run(model, {"logits": logits, "labels": labels})["loss"]
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1].reshape(-1, 11)), torch.from_numpy(labels[:, 1:].reshape(-1))
    )
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_without_a_counted_label_has_loss_zero() -> None:
    model = loss_graph("text-generation", ["batch", "sequence", 5])
    feeds = {"logits": np.ones((2, 3, 5), np.float32), "labels": np.full((2, 3), -100)}
    assert run(model, feeds)["loss"] == 0.0


def test_logits_of_any_size_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], np.float32)
    feeds = {"logits": logits, "labels": np.array([0, 1])}
    got = run(loss_graph("text-classification", ["batch", 3], "single_label_classification"), feeds)["loss"]
    assert got == pytest.approx(5e3)


@pytest.mark.parametrize("outputs", [1, 4])
def test_the_regression_loss_is_the_mean_squared_error(outputs: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 5, outputs)).astype(np.float32)
    got = run(
        loss_graph("text-classification", ["batch", outputs], "regression"),
        {"logits": logits, "labels": labels},
    )
    expected = torch.nn.functional.mse_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    assert got["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_of_several_labels_is_binary_cross_entropy_and_does_not_overflow() -> None:
    rng = np.random.default_rng(0)
    logits = (8 * rng.standard_normal((5, 4))).astype(np.float32)
    logits[0] = [1e4, -1e4, 1e4, -1e4]
    labels = rng.integers(0, 2, (5, 4)).astype(np.float32)
    labels[0] = [1, 0, 0, 1]
    model = loss_graph("image-classification", ["batch", 4], "multi_label_classification")
    got = run(model, {"logits": logits, "labels": labels})["loss"]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(labels)
    )
    assert got == pytest.approx(expected.item(), rel=1e-6)


def test_labels_of_an_encoder_decoder_are_not_shifted() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 6, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (3, 6))
    labels[1, 2:] = -100
    model = loss_graph("text2text-generation", ["batch", "decoder_sequence", 11])
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits.reshape(-1, 11)), torch.from_numpy(labels.reshape(-1))
    )
    got = run(model, {"logits": logits, "labels": labels})["loss"]
    assert got == pytest.approx(expected.item(), rel=1e-6)


def test_the_ranking_loss_is_that_of_cosines() -> None:
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((6, 16)).astype(np.float32)
    got = run(loss_graph("feature-extraction", ["batch", 16]), {"sentence_embedding": embedding})["loss"]
    anchors, positives = torch.nn.functional.normalize(torch.from_numpy(embedding), dim=-1).chunk(2)
    expected = torch.nn.functional.cross_entropy(20 * anchors @ positives.T, torch.arange(3))
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_adamw_is_torchs() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(37).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    model = build_adamw()
    state = {"param": start, "exp_avg": np.zeros(37, np.float32), "exp_avg_sq": np.zeros(37, np.float32)}
    scalars = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "clip_coef": 0.5}
    for step in range(1, 21):
        grad = rng.standard_normal(37).astype(np.float32)
        parameter.grad = torch.from_numpy(0.5 * grad)
        optimizer.step()
        feeds = {name: np.array(value, np.float32) for name, value in {**scalars, "step": step}.items()}
        outputs = run(model, {**state, "grad": grad, **feeds})
        state = {name: outputs[f"{name}_out"] for name in state}
        np.testing.assert_allclose(state["param"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_gradient_norm_is_the_root_of_the_sum_over_chunks() -> None:
    grad = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    model = build_grad_norm()
    total = sum(run(model, {"grad": part})["sum_of_squares"] for part in np.split(grad, [300, 301]))
    assert np.sqrt(total) == pytest.approx(np.linalg.norm(grad), rel=1e-6)


@pytest.mark.parametrize("role", ["inference", "train"])
def test_the_memory_formula_predicts_sizes_it_has_not_seen(
    exported: Callable[[str, int], Exported], role: str
) -> None:
    """At sizes far from the grid, onnxruntime's own peak of requested bytes equals the formula's."""
    bundle = exported("bert-classifier", 4)
    manifest = bundle.manifest
    formula = manifest.inference_memory if role == "inference" else manifest.strategies[0].memory
    spec = manifest.graphs[role]
    data = Path(bundle.folder / spec.file).read_bytes()
    for batch, sequence, rank in ((3, 33, 2), (16, 60, 8)):
        feeds = sample_feeds(spec, axis_sizes(batch, sequence), rank)
        (in_use,) = memory.bytes_in_use(data, bundle.folder, [feeds])
        measured = float(in_use.max() - in_use.min())
        assert formula.activation_bytes(batch, sequence, rank) == pytest.approx(measured, rel=0.02)


def test_tidy_merges_duplicates_and_drops_what_nothing_reads() -> None:
    graph = ir.Graph([], [], nodes=[], name="g")
    model = new_model(graph)
    x = graph_input(graph, "x", [2])
    twins = [ir.node("Exp", [x]) for _ in range(2)]
    graph.extend([*twins, ir.node("Log", [x])])
    total = ir.node("Add", [twins[0].outputs[0], twins[1].outputs[0]])
    graph.append(total)
    graph.outputs.append(total.outputs[0])
    tidy(model)
    assert sorted(node.op_type for node in graph) == ["Add", "Exp"]


def test_what_nothing_reads_is_run_as_soon_as_it_can_be(tmp_path: Path) -> None:
    """A chain of cotangents with a gradient of each: by onnxruntime's own account none is kept for longer."""
    peaks = []
    for moved in (False, True):
        graph = ir.Graph([], [], nodes=[], name="chain")
        model = new_model(graph)
        value = graph_input(graph, "x", [1024])
        for _ in range(20):
            value = append(graph, "Exp", [value], shape=[1024])
            graph.outputs.append(append(graph, "ReduceMax", [value], {"keepdims": 0}, shape=[]))
        tidy(model)
        if moved:
            assert run_in_order(graph) == 20
        data = ir.to_proto(model).SerializeToString()
        (in_use,) = memory.bytes_in_use(data, tmp_path, [{"x": np.zeros(1024, np.float32)}])
        peaks.append(float(in_use.max() - in_use.min()))
    assert peaks[0] > 15 * 4096
    assert peaks[1] < 4 * 4096


def test_a_graph_that_does_not_run_is_named(tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], name="halves")
    model = new_model(graph)
    x = graph_input(graph, "x", ["batch", 4], ir.DataType.FLOAT16)
    rows = initializer(graph, "rows", np.array([[0]]))
    once = append(graph, "ScatterND", [x, rows, x], {"reduction": "add"}, shape=x.shape, dtype=x.dtype)
    graph.outputs.append(once)
    with pytest.raises(ExportError, match=r"graphs/train\.onnx: onnxruntime .* does not run .*ScatterND"):
        memory.measure_peaks(
            ir.to_proto(model).SerializeToString(),
            graph_spec(model, "graphs/train.onnx", serves=False),
            tmp_path,
        )
