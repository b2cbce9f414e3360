"""A zoo of small random-weight models through export: outputs, loss and gradients against PyTorch + PEFT.

The exporter's own verification does the comparing; `test_refusals` shows that it can fail, and `test_parity`
compares two families without it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import edgepeft

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "head_dim": 16, "sliding_window": 8}
CLASSIFIER = {**TEXT, "num_labels": 3}

#: Family: configuration class, model class, sizes.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", WINDOWED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", WINDOWED),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", WINDOWED),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 64, "bos_token_id": 1}
        | {"eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "opt": ("OPTConfig", "OPTForCausalLM", {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GROUPED),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GROUPED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "bert": ("BertConfig", "BertForSequenceClassification", CLASSIFIER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", CLASSIFIER),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", CLASSIFIER),
    "camembert": ("CamembertConfig", "CamembertForSequenceClassification", CLASSIFIER),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 320, "num_labels": 3}
        | {"max_position_embeddings": 64},
    ),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification", CLASSIFIER),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", CLASSIFIER),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", CLASSIFIER),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification", CLASSIFIER),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        {**CLASSIFIER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
        | {"global_attn_every_n_layers": 2},
    ),
}
#: One of each kind of layer that quantization touches: grouped, windowed, Conv1D, shared, relative positions.
AT_4_BITS = ("llama", "gemma3", "gpt2", "bert", "albert", "deberta-v2", "modernbert")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits"), [*((family, 32) for family in FAMILIES), *((family, 4) for family in AT_4_BITS)]
)
def test_a_family_equals_pytorch_with_a_lora_on_every_linear(family: str, bits: int, tmp_path: Path) -> None:
    config, model, sizes = FAMILIES[family]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    manifest = edgepeft.export(built, tmp_path / "bundle", bits=bits, rank=4)
    (gradients,) = manifest.verification["gradients"].values()
    assert max(manifest.verification["outputs"].values()) <= {32: 1e-4, 4: 1e-3}[bits]
    assert gradients["smallest_cosine"] >= 0.9999
    assert gradients["largest_norm_difference"] <= 1e-3
