"""Files of other exporters are cut into stages like a traced model, whatever their constants are called."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import edgepeft
from edgepeft.bundle.manifest import CHECKPOINTED, FORWARD_ONLY, RESIDENT, STREAMED, STREAMED_INFERENCE
from edgepeft.bundle.reader import open_bundle
from edgepeft.cli import main
from edgepeft.exporters.contents import Losses
from edgepeft.exporters.forward import build_forward
from edgepeft.exporters.graph import initializer, new_model
from edgepeft.exporters.partition import Uncut, build_partition, build_streamed_inference
from edgepeft.exporters.partition.copying import Copier
from edgepeft.exporters.quantize.freeze import Freezer
from edgepeft.exporters.sources.onnx_file import load_onnx_file
from edgepeft.exporters.writer import WeightWriter, write_graph
from edgepeft.runtime.inputs import check_batch, model_inputs

from .. import models
from ..foreign_names import STYLES
from ..partition.test_partition import both_ways
from ..partition.test_streamed_inference import streamed

ALL = [RESIDENT, CHECKPOINTED, STREAMED, FORWARD_ONLY]


@pytest.mark.parametrize(
    "name",
    [
        "bert-script",
        pytest.param("bert-fused", marks=pytest.mark.slow),
        pytest.param("bert-qdq", marks=pytest.mark.slow),
        "bert-q8",
        pytest.param("llama-script", marks=pytest.mark.slow),
        pytest.param("llama-positions", marks=pytest.mark.slow),
        pytest.param("llama-q4-asymmetric", marks=pytest.mark.slow),
    ],
)
def test_every_strategy_and_the_same_gradients(
    files: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    bits = None if "q" in name.split("-")[1] else 32
    manifest = edgepeft.export(files(name), tmp_path / "b", bits=bits, rank=4, verify=False)
    assert [strategy.name for strategy in manifest.strategies] == ALL
    assert manifest.streamed_inference is not None
    assert manifest.missing == {}
    assert manifest.partition is not None
    layers = [stage for stage in manifest.partition.stages if stage.adapter]
    assert len({stage.forward for stage in layers}) < len(layers), "equal layers share a graph"
    labels = "tokens" if name.startswith("llama") else 3
    loss, staged_loss, resident, staged = both_ways(tmp_path / "b", models.batch(labels=labels))
    assert staged_loss == pytest.approx(loss, rel=1e-6, abs=2e-6)
    for key, expected in resident.gradients.items():
        difference = np.linalg.norm(staged.gradients[key] - expected)
        assert difference <= 1e-5 * max(np.linalg.norm(expected), 1e-3), key
    arrays = {name: array for name, array in models.batch().arrays.items() if name != "labels"}
    with edgepeft.load(tmp_path / "b") as device:
        expected = device.forward(arrays, adapter="default")["logits"]
    taken = check_batch(manifest, model_inputs(manifest, manifest.graphs["inference"].inputs), arrays)
    got = streamed(tmp_path / "b", "default").forward(taken)
    # Of `DequantizeLinear → MatMul` onnxruntime rounds the activations where the weight is a constant.
    tolerance = 5e-2 if name in ("bert-qdq", "bert-q8") else 1e-4
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("style", STYLES)
def test_names_decide_nothing(files: Callable[[str], Path], tmp_path: Path, style: str) -> None:
    model = onnx.load(files("bert-script"))
    STYLES[style](model)
    onnx.save(model, tmp_path / "renamed.onnx")
    source = load_onnx_file(tmp_path / "renamed.onnx")
    freezer = Freezer(32, 32)
    training = build_forward(source, freezer, modules=None, training=True)
    partition = build_partition(training, Losses(source, None, False).judged)
    assert not isinstance(partition, Uncut)
    streamed = build_streamed_inference(build_forward(source, freezer, modules=None), slice_output=False)
    assert not isinstance(streamed, Uncut)
    assert len({stage.forward for stage in streamed.wiring.stages}) == len(streamed.wiring.stages) - 1


def test_a_name_that_a_file_has_taken_does_not_give_its_value(
    files: Callable[[str], Path], tmp_path: Path
) -> None:
    """`zero_float32` of a file need not be zero."""
    model = onnx.load(files("bert-script"))
    STYLES["ours"](model)
    onnx.save(model, tmp_path / "taken.onnx")
    manifest = edgepeft.export(tmp_path / "taken.onnx", tmp_path / "b", bits=32, rank=2)
    assert manifest.verification["outputs"]["no adapter"] <= 1e-4


def test_large_constants_of_two_graphs_may_be_called_the_same(tmp_path: Path) -> None:
    """Real MiniLM has tables of positions that stages copy: `two different tensors are named …`."""
    with (tmp_path / "weights.bin").open("wb") as file:
        weights = WeightWriter(file)
        for size in (512, 600):
            graph = ir.Graph([], [], nodes=[], name="whole")
            table = initializer(graph, "table", np.arange(size, dtype=np.int64))
            graph.append(ir.node("Neg", [table]))
            copier = Copier("stage")
            for node in graph:
                copier.copy(node)
            write_graph(new_model(copier.graph), tmp_path / f"{size}.onnx", weights, "weights.bin")
    assert sorted(tensor.nbytes for tensor in weights.tensors.values()) == [512 * 8, 600 * 8]


def test_a_constant_is_made_where_the_graph_has_another_of_its_name() -> None:
    graph = ir.Graph([], [], nodes=[], name="somebody else's")
    theirs = initializer(graph, "one", np.array(2, np.float32))
    ours = initializer(graph, "one", np.array(1, np.float32))
    assert ours is initializer(graph, "one", np.array(1, np.float32))
    assert theirs is initializer(graph, "one", np.array(2, np.float32))
    assert [value.const_value.numpy() for value in (theirs, ours) if value.const_value] == [2, 1]


@pytest.mark.slow
def test_what_a_bundle_cannot_do_is_said(switched: Callable[[str], Path]) -> None:
    folder = switched("seq2seq")
    missing = open_bundle(folder).manifest.missing
    assert missing == {
        STREAMED_INFERENCE: "every layer of the decoder reads what the encoder made",
        **dict.fromkeys((CHECKPOINTED, STREAMED), missing[STREAMED]),
    }
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert "checkpointed, streamed: its layers" in result.stdout
    assert "streamed inference: every layer" in result.stdout
    assert (
        json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--json"]).stdout)["missing"] == missing
    )
