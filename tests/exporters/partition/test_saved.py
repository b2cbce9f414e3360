"""What a backward pass keeps of its forward pass."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.exporters.partition.cuts import ancestors
from edgepeft.exporters.partition.saved import choose_saved
from edgepeft.runtime.memory.plan import Workload
from edgepeft.runtime.memory.planner import choose, plans

from .. import models


def graph_of(text: str) -> ir.Graph:
    graph = ir.from_onnx_text(text).graph
    for node in graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape([4, 8])
    return graph


def test_one_value_is_kept_in_the_place_of_two_that_are_cheap_to_make_of_it() -> None:
    """The backward pass of x · sigmoid(x) reads both; both are made of the product x."""
    graph = graph_of(
        """
        <ir_version: 10, opset_import: ["": 21]>
        agraph (float[4, 8] a, float[8, 8] w, float[4, 8] dy) => (float[4, 8] y, float[4, 8] dx) {
            x = MatMul(a, w)
            s = Sigmoid(x)
            silu = Mul(x, s)
            y = MatMul(silu, w)
            g = Mul(dy, s)
            h = Mul(g, silu)
            dx = Add(g, h)
        }
        """
    )
    saved = choose_saved(graph, ancestors([graph.outputs[0]]))
    assert [value.name for value in saved.kept] == ["x"]
    assert [node.outputs[0].name for node in saved.again] == ["s", "silu"]


def test_what_inputs_give_is_not_kept_and_products_are_not_run_again() -> None:
    graph = graph_of(
        """
        <ir_version: 10, opset_import: ["": 21]>
        agraph (float[4, 8] a, float[8, 8] w, float[4, 8] dy) => (float[4, 8] y, float[4, 8] dx) {
            n = Neg(a)
            p = MatMul(n, w)
            q = MatMul(p, w)
            y = Add(q, p)
            g = Mul(dy, n)
            h = Mul(g, q)
            dx = Mul(h, p)
        }
        """
    )
    saved = choose_saved(graph, ancestors([graph.outputs[0]]))
    assert [value.name for value in saved.kept] == ["p", "q"]
    assert [node.outputs[0].name for node in saved.again] == ["n"]


def test_more_memory_is_never_slower_and_never_overdrawn(tied_llama: Path) -> None:
    manifest = open_bundle(tied_llama).manifest
    sizes = Workload(rows=8, seq_len=256, rank=4, adapter_values=50_000, trained_values=50_000)
    least = min(plan.peak_bytes for plan in plans(manifest, sizes, 50 * 2**20, 0) if plan.exact)
    last = None
    held = set()
    for budget_bytes in range(int(1.03 * least), 4 * least, least // 50):
        plan = choose(plans(manifest, sizes, 50 * 2**20, budget_bytes), budget_bytes)
        assert plan.fits(budget_bytes)
        assert plan.relative_step is not None
        assert last is None or plan.relative_step <= last + 1e-9
        last = plan.relative_step
        held.add(plan.held.stages)
    assert last == 1.0, "plenty is enough for the resident graph"
    assert len(held) > 1, "what lies between holds some stages"


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_slices_of_the_output_layer_give_pytorchs_gradients(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of 7 rows in the training graph; the export compares it with PyTorch."""
    monkeypatch.setattr(
        "edgepeft.exporters.training.sliced_loss.SLICE_VALUES", 7 * models.SIZES["hidden_size"]
    )
    manifest = edgepeft.export(models.llama(tied=tied), tmp_path / "bundle", rank=4)
    assert manifest.verification["gradients"]["default"]["smallest_cosine"] > 0.9999
    graph = onnx.load(tmp_path / "bundle" / "graphs" / "train.onnx", load_external_data=False).graph
    rows = [node.attribute for node in graph.node if node.op_type == "MatMulNBits"]
    vocabulary = models.SIZES["vocab_size"]
    assert not any(item.name == "N" and item.i == vocabulary for attributes in rows for item in attributes)
