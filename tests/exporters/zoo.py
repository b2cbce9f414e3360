"""The zoo: a small random-weight model of every family, exported at 32 and 4 bits and compared with PyTorch.

The exporter's own verification does the comparing; `test_refusals` shows that it can fail, and `test_parity`
compares some families without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
import transformers

import edgepeft
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.exporters.sources import transformers_model
from edgepeft.exporters.sources.base import Traced
from edgepeft.exporters.sources.transformers_model import Source

BITS = (32, 4)
BLOCK_SIZE = 16

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
    "initializer_range": 0.1,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "head_dim": 16, "sliding_window": 8}
CLASSIFIER = {**TEXT, "num_labels": 3}
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": 3,
    "initializer_range": 0.1,
}
VISION = {**ENCODER, "image_size": 16, "patch_size": 4}
STAGES = {"image_size": 32, "patch_size": 2, "depths": [1, 2], "num_labels": 3, "initializer_range": 0.1}
AUDIO = {
    **ENCODER,
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
}

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
        | {"eos_token_id": 2, "initializer_range": 0.1},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "initializer_range": 0.1},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GROUPED),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GROUPED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "bert": ("BertConfig", "BertForSequenceClassification", CLASSIFIER),
    "bert-tokens": ("BertConfig", "BertForTokenClassification", CLASSIFIER),
    "bert-sentences": ("BertConfig", "BertModel", TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", CLASSIFIER),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", CLASSIFIER),
    "camembert": ("CamembertConfig", "CamembertForSequenceClassification", CLASSIFIER),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 320, "num_labels": 3}
        | {"max_position_embeddings": 64, "initializer_range": 0.1},
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
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 320}
        | {"decoder_start_token_id": 0},
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 320}
        | {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 2, "init_std": 0.1},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION),
    "deit": ("DeiTConfig", "DeiTForImageClassification", VISION),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {**STAGES, "embed_dim": 32, "num_heads": [2, 4], "window_size": 4, "depths": [2, 2]},
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {**STAGES, "num_stages": 2, "hidden_sizes": [32, 64], "layer_scale_init_value": 0.5},
    ),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", AUDIO),
    "hubert": ("HubertConfig", "HubertForSequenceClassification", AUDIO),
    "wavlm": (
        "WavLMConfig",
        "WavLMForSequenceClassification",
        {**AUDIO, "num_buckets": 16, "max_bucket_distance": 32},
    ),
}


@dataclass(frozen=True)
class Figures:
    """How a bundle compares with PyTorch: the largest difference of an output and of a gradient's norm, the
    smallest cosine of a gradient."""

    output: float
    cosine: float
    norm: float


@dataclass(frozen=True)
class Measured:
    """What the export of a family gave: nodes of the graphs at 4 bits, figures by bits."""

    task: str
    forward_nodes: int
    training_nodes: int
    figures: dict[int, Figures]


def build(family: str) -> transformers.PreTrainedModel:
    """The family's model, with the same weights every time."""
    config, model, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def measure(family: str, folder: Path) -> Measured:
    """Export a family at all of `BITS` below `folder`, with a LoRA on every linear.

    Raises:
        VerificationError: a bundle disagrees with PyTorch.
    """
    manifests: dict[int, Manifest] = {}
    with traced_once():
        for bits in BITS:
            manifests[bits] = edgepeft.export(
                build(family), folder / str(bits), bits=bits, block_size=BLOCK_SIZE, rank=4
            )
    nodes = {
        role: len(
            onnx.load(folder / "4" / manifests[4].graphs[role].file, load_external_data=False).graph.node
        )
        for role in ("inference", "train")
    }
    figures = {bits: _figures(manifest) for bits, manifest in manifests.items()}
    return Measured(manifests[4].task, nodes["inference"], nodes["train"], figures)


@contextmanager
def traced_once() -> Iterator[None]:
    """Let exports of one model share its trace, which takes most of the time, and leave memory
    unmeasured, which takes most of the rest."""
    traces: list[Traced] = []
    trace = transformers_model.trace

    def trace_once(source: Source, *, with_past: bool = False) -> Traced:
        if not traces:
            traces.append(trace(source, with_past=with_past))
        kept = traces[0].copy()
        return Traced(kept.model, {name: weight.clone() for name, weight in kept.weights.items()})

    with (
        patch.object(transformers_model, "trace", trace_once),
        patch("edgepeft.exporters.measure.bundle.graph_formula", lambda *_: MemoryFormula(0, ())),
    ):
        yield


def _figures(manifest: Manifest) -> Figures:
    (gradients,) = manifest.verification["gradients"].values()
    return Figures(
        output=max(manifest.verification["outputs"].values()),
        cosine=gradients["smallest_cosine"],
        norm=gradients["largest_norm_difference"],
    )
