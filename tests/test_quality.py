"""What `benchmarks.quality` stands on: weights that move while the function stays, and llama.cpp's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import edgepeft
from benchmarks.llama_cpp_files import Names, importance_matrix, tensor_bytes, write_float16
from benchmarks.moved_model import Workplace, docstrings, move, of_transformers
from benchmarks.quality import bundle_row, float_row, judged, table
from edgepeft.exporters.sources.gguf import load_gguf

from .exporters import models
from .exporters.sources.test_gguf import write

IDS = list(range(3, 19))


def gemma() -> transformers.PreTrainedModel:
    """Norms of 1 + w after each layer and of the heads, heads wider than the hidden size has room for."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**models.SIZES, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.Gemma3TextConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)
    model: transformers.PreTrainedModel = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("norm.weight"):
                tensor.normal_(std=0.2)
    return model


@pytest.mark.parametrize("make", [lambda: models.llama(tied=True), lambda: models.llama(tied=False), gemma])
def test_moved_weights_are_others_and_the_function_is_the_same(
    make: Callable[[], transformers.PreTrainedModel],
) -> None:
    model, other = make(), make()
    move(other)
    parameters = dict(other.named_parameters())
    for name, tensor in model.named_parameters():
        if tensor.ndim == 2:
            assert (parameters[name] != tensor).float().mean() > 0.9, name
    tied = other.get_input_embeddings().weight is other.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    torch.testing.assert_close(of_transformers(other)(IDS), of_transformers(model)(IDS), atol=1e-4, rtol=0)


def test_a_float16_file_of_moved_weights_is_read_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    model, _, _ = load_gguf(tmp_path / "tiny.gguf")
    move(model)
    write_float16(model, tmp_path / "tiny.gguf", tmp_path / "moved.gguf")
    read, _, _ = load_gguf(tmp_path / "moved.gguf")
    for name, tensor in model.named_parameters():
        expected = tensor.half().float() if tensor.ndim == 2 else tensor
        assert torch.equal(read.state_dict()[name], expected), name
    matrices = sum(tensor.numel() for tensor in model.parameters() if tensor.ndim == 2)
    vectors = sum(tensor.numel() for tensor in model.parameters() if tensor.ndim == 1)
    assert tensor_bytes(tmp_path / "moved.gguf") == 2 * matrices + 4 * vectors


def test_names_are_the_architectures() -> None:
    assert Names("llama", 2)["model.layers.1.mlp.down_proj.weight"] == "blk.1.ffn_down.weight"
    assert (
        Names("gemma3", 2)["model.layers.0.post_feedforward_layernorm.weight"] == "blk.0.post_ffw_norm.weight"
    )


def test_importance_is_the_mean_square_of_each_input() -> None:
    model = models.llama(tied=True)
    found = importance_matrix(model, "llama", [IDS, IDS[:8]])
    assert len(found) == 2 * 7
    inputs = []
    norm = model.model.layers[0].input_layernorm
    for ids in (IDS, IDS[:8]):
        inputs.append(norm(model.get_input_embeddings()(torch.tensor(ids))).detach().numpy())
    for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight"):
        np.testing.assert_allclose(found[name], (np.concatenate(inputs) ** 2).mean(0), rtol=1e-5)


def test_docstrings_are_found_without_an_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""One."""\nraise SystemExit\n\nclass A:\n    """Two."""\n    def b(self): ...\n', "utf-8"
    )
    assert docstrings([path]) == ["One.", "Two."]


@pytest.fixture
def work(tmp_path: Path) -> Workplace:
    """A tiny model's texts, a window of A and one of B, and what it makes of them."""
    model = models.llama(tied=True)
    windows = {"A": [IDS], "B": [IDS[::-1]]}
    rows = [of_transformers(model)(ids)[:-1].log_softmax(-1) for (ids,) in windows.values()]
    np.save(tmp_path / "reference.npy", torch.stack(rows).numpy())
    (tmp_path / "windows.json").write_text(json.dumps(windows), "utf-8")
    (tmp_path / "model.json").write_text(json.dumps({"parameters": model.num_parameters()}), "utf-8")
    return Workplace(tmp_path, tmp_path / "tiny.gguf")


def test_a_model_is_judged_by_its_distance_from_the_float_one(work: Workplace) -> None:
    logits = of_transformers(models.llama(tied=True))
    same, flatter = judged(logits, work), judged(lambda ids: logits(ids) / 2, work)
    expected, got = (logits(IDS)[:-1].double().div(by).log_softmax(-1).numpy() for by in (1, 2))
    chosen = got[np.arange(len(IDS) - 1), IDS[1:]]
    assert same["A"]["kl"] == pytest.approx(0, abs=1e-6)
    assert flatter["A"]["kl"] == pytest.approx((np.exp(expected) * (expected - got)).sum(1).mean(), rel=1e-4)
    assert flatter["A"]["perplexity"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    assert same["B"]["top1"] == flatter["B"]["top1"] == 1
    with_float = float_row(work)["judged"]
    assert with_float["B"]["perplexity"] == pytest.approx(same["B"]["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_a_bundle_is_judged_with_exact_and_with_rounded_activations(work: Workplace, tmp_path: Path) -> None:
    edgepeft.export(
        models.llama(tied=True), tmp_path / "4.edge", bits=4, train=False, verify=False, targets=()
    )
    row = bundle_row(tmp_path / "4.edge", work, 1, rounded=True)
    weights = work.parameters()
    assert weights / 2 < row["tensor_bytes"] < weights
    assert row["tensor_bytes"] <= row["file_bytes"]
    assert 0 < row["judged"]["A"]["kl"] < 1
    assert row["judged"]["A"]["kl"] != row["judged_rounded"]["A"]["kl"]
    assert len(table({"tiny": row, "float": float_row(work)}, weights).splitlines()) == 3
