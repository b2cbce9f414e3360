"""What is written into a bundle is no larger than it need be."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx

from edgepeft.exporters.sources.loading import load_source

from . import models, task_models
from .conftest import Exported


def test_nodes_say_which_module_they_come_from(exported: Callable[[str, int], Exported]) -> None:
    """By the module's name in the model, and nothing else of the machine that exported."""
    bundle = exported("llama-tied", 4)
    known = {name for name, _ in bundle.build().named_modules()}
    for role in ("inference", "train"):
        graph = onnx.load(bundle.folder / bundle.manifest.graphs[role].file, load_external_data=False).graph
        assert not any(node.doc_string for node in graph.node)
        entries = [entry for node in graph.node for entry in node.metadata_props]
        assert {entry.key for entry in entries} == {"namespace"}
        said = {entry.value for entry in entries}
        assert {"model.layers.1.self_attn", "model.layers.1.mlp", "model.norm"} <= said <= known


def test_a_tokenizer_has_no_spaces_between_its_tokens(tmp_path: Path) -> None:
    folder = task_models.save_with_words(models.llama(tied=True), tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=2), "utf-8")
    written = load_source(str(folder), task=None).tokenizer_files["tokenizer.json"]
    assert json.loads(written)["model"] == content["model"]
    assert b"\n" not in written
    assert b'": ' not in written
