"""What edgepeft leans on in other packages: names that are not promised, and what a version of them changed.

A release that breaks one of these fails here by its name, not somewhere in an export.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from torch.utils import _pytree as pytree
from transformers.exporters.exporter_onnx import OnnxExporter

import edgepeft
from edgepeft.errors import ExportError
from edgepeft.exporters import versions
from edgepeft.exporters.sources import samples
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.tracing import trace

from ... import environments
from .. import models

pytestmark = pytest.mark.versions

DECISIONS = Path(__file__).parents[3] / "docs" / "decisions" / "dependencies.md"
#: Module, names and what changed in which version, of all that is not documented as stable.
#: `docs/decisions/dependencies.md` says what each is for.
LEANS = [
    (
        "transformers.exporters.exporter_onnx",
        "OnnxConfig OnnxExporter",
        "new in 5.13; other results since 5.23",
    ),
    ("transformers", "Cache DynamicCache", "layers with keys and values since 4.56"),
    ("transformers.pytorch_utils", "Conv1D", "unchanged since 4"),
    (
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "unchanged since 4; values may be tuples since 5",
    ),
    (
        "optimum.exporters.tasks",
        "TasksManager",
        "no task of a folder; requests undeclared (2.3)",
    ),
    (
        "optimum.utils",
        "DummyTextInputGenerator NormalizedConfigManager NormalizedTextConfig",
        "unchanged since 2",
    ),
    ("onnxscript.rewriter.onnx_fusions", "fuse", "new in 0.5"),
    ("onnxscript.rewriter.rules.fusion._layer_norm", "fuse_layer_normalization", "private; new in 0.5"),
    ("onnxscript.rewriter.pattern", "RewriteRule", "its _target_pattern is private"),
    ("onnxscript.version_converter", "convert_version", "new in 0.2"),
    (
        "onnx_ir.passes.common",
        "CommonSubexpressionEliminationPass RemoveUnusedNodesPass TopologicalSortPass",
        "0.1",
    ),
    ("onnxruntime.tools.symbolic_shape_infer", "SymbolicShapeInference", "a tool inside the wheel"),
    (
        "onnxruntime.capi.onnxruntime_pybind11_state",
        "Fail InvalidArgument NotImplemented",
        "its own exceptions",
    ),
    ("torch.utils._pytree", "tree_leaves", "private; what torch.export itself lays inputs out by"),
]


@pytest.mark.parametrize(("module", "names", "changed"), LEANS, ids=[lean[0] for lean in LEANS])
def test_names_that_are_not_promised_are_there(module: str, names: str, changed: str) -> None:
    """The import fails with the version that took the name away; the list says what changed before."""
    found = importlib.import_module(module)
    missing = [name for name in names.split() if not hasattr(found, name)]
    assert not missing, f"{module} has no {missing} any more ({changed})"


@pytest.mark.parametrize("module", [lean[0] for lean in LEANS])
def test_what_is_leaned_on_is_written_down(module: str) -> None:
    assert f"`{module}`" in DECISIONS.read_text(encoding="utf-8")


Change = Callable[[ir.Graph], None]


def traced_after(change: Change, monkeypatch: pytest.MonkeyPatch) -> ir.Graph:
    """A tiny Llama's graph with a cache, traced by an exporter whose graph `change` has been applied to."""
    export = OnnxExporter.export

    def changed(self: OnnxExporter, *args: Any, **kwargs: Any) -> Any:
        exported = export(self, *args, **kwargs)
        change((exported.program if hasattr(exported, "program") else exported.model).graph)
        return exported

    monkeypatch.setattr(OnnxExporter, "export", changed)
    return trace(load_source(models.llama(tied=True)), with_past=True).model.graph


def interface(graph: ir.Graph, weights: int) -> tuple[list[tuple[str | None, str]], list[str | None]]:
    inputs = list(graph.inputs)[: len(graph.inputs) - weights]
    return [(value.name, str(value.shape)) for value in inputs], [value.name for value in graph.outputs]


@pytest.mark.slow
def test_inputs_and_caches_are_found_whatever_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 renamed `past_key_values.{i}` to `cache.{i}`: a KeyError ended every export."""
    expected = [("input_ids", "[batch,sequence]"), ("attention_mask", "[batch,total_sequence]")]
    names = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    expected += [(f"past_key_values.{name}", "[batch,2,past_sequence,16]") for name in names]
    weights = len(dict(models.llama(tied=True).named_parameters()))

    def rename(graph: ir.Graph) -> None:
        for index, value in enumerate(graph.inputs):
            value.name = f"something_{index}"
        graph.outputs[1:] = list(graph.outputs)[:0:-1]  # and the presents in another order

    inputs, outputs = interface(traced_after(rename, monkeypatch), weights)
    assert inputs == expected
    assert outputs[1:] == [f"present.{name}" for name in names]


def test_a_present_grows_from_its_own_past(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = traced_after(lambda _: None, monkeypatch)
    for past in graph.inputs:
        if (past.name or "").startswith("past_key_values."):
            (joined,) = [node.outputs[0] for node, _ in past.uses() if node.op_type == "Concat"]
            assert joined.name == (past.name or "").replace("past_key_values", "present")


def test_a_trace_with_other_inputs_is_refused_with_the_versions_that_were_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ExportError, match=r"other inputs.*transformers .* versions that were run \(.*<=5\."):
        traced_after(lambda graph: graph.inputs.pop(1), monkeypatch)


@pytest.mark.slow
def test_a_trace_without_its_presents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"returns 3 values behind its logits.*2 layers"):
        traced_after(lambda graph: graph.outputs.pop(), monkeypatch)


@pytest.mark.slow
def test_both_kinds_of_result_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.23 the exporter returned an ONNXProgram (`.model`), since then an ExportedModel."""
    export = OnnxExporter.export
    source = load_source(models.bert_classifier())
    graphs = []
    for name in ("model", "program"):

        def renamed(self: OnnxExporter, *args: Any, _name: str = name, **kwargs: Any) -> SimpleNamespace:
            exported = export(self, *args, **kwargs)
            program = exported.program if hasattr(exported, "program") else exported.model
            return SimpleNamespace(**{_name: program})

        monkeypatch.setattr(OnnxExporter, "export", renamed)
        graphs.append(trace(source).model.graph)
    assert [value.name for value in graphs[0].inputs] == [value.name for value in graphs[1].inputs]


@pytest.mark.slow
def test_a_cache_is_taken_apart_as_its_pytree_says() -> None:
    """The order of keys and values is transformers' own; leaves are recognized, not counted."""
    source = load_source(models.llama(tied=True))
    trace(source, with_past=True)  # registers the cache's pytree
    sample = samples.sample_inputs(source, with_past=True)
    leaves = sample.named_leaves()
    assert [id(leaf.tensor) for leaf in leaves] == [id(leaf) for leaf in pytree.tree_leaves(sample.inputs)]
    layers = next(value for value in sample.inputs.values() if not isinstance(value, torch.Tensor)).layers
    by_name = {leaf.name: leaf.tensor for leaf in leaves}
    assert by_name["past_key_values.1.key"] is layers[1].keys
    assert by_name["past_key_values.1.value"] is layers[1].values


def test_the_cache_goes_in_under_the_name_that_the_model_has_for_it() -> None:
    """`past_key_values` until 5.23; `cache` since, when the old name began to warn."""
    model = models.llama(tied=True)
    name = next(name for name in samples.sample_inputs(load_source(model), True).inputs if "ids" not in name
                and "mask" not in name)  # fmt: skip
    newest = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    assert name == ("cache" if newest else "past_key_values")


def test_versions_outside_their_range_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line, and the export goes on: whoever has the next release may be lucky."""
    declared = {"transformers": Requirement("transformers<=4.0"), "torch": Requirement("torch>=2")}
    monkeypatch.setattr(versions, "requirements_run", lambda: declared)
    told: list[str] = []
    model = models.bert_classifier()
    edgepeft.export(model, tmp_path / "b.edge", train=False, verify=False, report=told.append)
    assert told[0] == f"not run with transformers {transformers.__version__} (run: <=4.0): trying"
    assert (tmp_path / "b.edge" / "manifest.json").exists()


def test_the_ranges_are_those_of_the_project() -> None:
    """`versions` reads the installed package's, which an editable install keeps from when it was made."""
    found = versions.requirements_run()
    closed = {"torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "onnxscript", "onnxruntime"}
    for package in closed:
        operators = {item.operator for item in found[package].specifier}
        assert ">=" in operators, package
        assert operators & {"<", "<="}, package


def test_each_end_of_the_ranges_has_an_environment() -> None:
    oldest = {Requirement(line).name: line for line in environments.requirements("oldest")}
    newest = {Requirement(line).name: line for line in environments.requirements("newest")}
    assert re.fullmatch(r"transformers==5\.\d+(\.\d+)?", oldest["transformers"])
    assert not re.search(r"<", newest["transformers"])
    assert "<2.14" in newest["torch"]
    assert "==" not in oldest["pytest"]
    assert "torch" not in "".join(environments.requirements("oldest", device=True))
