"""Heads of any size: where onnxruntime's fused attention does not take it, the plain form generates."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import edgepeft

from .. import models


def llama(size: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **models.SIZES,
        num_key_value_heads=1,
        head_dim=size,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(size: int) -> transformers.PreTrainedModel:
    """Its queries and keys are not turned."""
    return models.gpt2(width=4 * size)


@pytest.mark.parametrize(
    ("build", "size", "fused"),
    [
        (llama, 10, False),
        *(pytest.param(llama, size, size == 16, marks=pytest.mark.slow) for size in (6, 16)),
        pytest.param(gpt2, 12, False, marks=pytest.mark.slow),  # which looks its positions up
    ],
)
def test_generated_tokens_are_those_of_transformers(
    build: type, size: int, fused: bool, tmp_path: Path
) -> None:
    model = build(size)
    edgepeft.export(model, tmp_path / "bundle", bits=32, train=False, verify=False)
    ids = (np.arange(9)[None] * 31 + 5) % 320
    with torch.no_grad():
        wanted = model.generate(
            input_ids=torch.from_numpy(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    with edgepeft.load(tmp_path / "bundle") as device:
        assert (device.manifest.decoder is not None) == fused
        got = device.generate_ids(ids[0].tolist(), max_new_tokens=12)
    assert got == wanted[0, 9:].tolist()[: len(got)]
    assert len(got) == 12 or got[-1] in device.manifest.model.eos_token_ids


@pytest.mark.slow
def test_a_model_of_odd_sizes_trains(tmp_path: Path) -> None:
    """The export verifies outputs, loss and gradients of every graph; nothing is a multiple of 32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=331,
        hidden_size=60,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=10,
        tie_word_embeddings=True,
        attention_bias=True,
        initializer_range=0.2,
    )
    manifest = edgepeft.export(transformers.LlamaForCausalLM(config).eval(), tmp_path / "bundle", rank=3)
    assert manifest.verification["gradients"]["default"]["smallest_cosine"] > 0.9999
