"""Tiny models of every task that is not in `models`, with a batch and records for each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from . import models
from .zoo import AUDIO, STAGES, VISION

SAMPLES = 163
LABELS = ("red", "green", "blue")


def _labelled(sizes: dict[str, Any], **options: Any) -> dict[str, Any]:
    sizes = {name: value for name, value in sizes.items() if name != "num_labels"}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    return {**sizes, **names, "initializer_range": 0.2, **options}


def vit(**options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_labelled(VISION, **options))
    ).eval()


def convnext() -> transformers.PreTrainedModel:
    """Convolutions stand between its linears, so gradients flow through them."""
    torch.manual_seed(0)
    sizes = {"num_stages": 2, "hidden_sizes": [32, 64], "layer_scale_init_value": 0.5}
    config = transformers.ConvNextConfig(**_labelled(STAGES, **sizes))
    return transformers.ConvNextForImageClassification(config).eval()


def wav2vec2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**_labelled(AUDIO))
    return transformers.Wav2Vec2ForSequenceClassification(config).eval()


def llama_classifier() -> transformers.PreTrainedModel:
    """A language model that classifies by its last token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **models.SIZES, max_position_embeddings=64, num_labels=3, pad_token_id=0, initializer_range=0.2
    )
    return transformers.LlamaForSequenceClassification(config).eval()


def bert_tokens() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**_labelled(models.SIZES, max_position_embeddings=64))
    return transformers.BertForTokenClassification(config).eval()


def bert(problem_type: str, outputs: int = 3) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **models.SIZES,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=outputs,
        problem_type=problem_type,
    )
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=320, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=320,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        init_std=0.2,
    )
    return transformers.BartForConditionalGeneration(config).eval()


#: Name: model, suffixes of the linears that get a LoRA, PEFT's task type.
BUILDERS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], list[str], str | None]] = {
    "vit": (vit, ["q_proj", "v_proj", "fc1", "fc2"], None),
    "vit-multi-label": (
        lambda: vit(problem_type="multi_label_classification"),
        ["q_proj", "v_proj"],
        None,
    ),
    "convnext": (convnext, ["pwconv1", "pwconv2"], None),
    "wav2vec2": (wav2vec2, ["q_proj", "v_proj", "projector"], None),
    "bert-tokens": (bert_tokens, ["query", "value", "dense"], "TOKEN_CLS"),
    "bert-regression": (lambda: bert("regression", 1), ["query", "value"], "SEQ_CLS"),
    "bert-regression-3": (lambda: bert("regression"), ["query", "value"], "SEQ_CLS"),
    "bert-multi-label": (lambda: bert("multi_label_classification"), ["query", "value"], "SEQ_CLS"),
    "llama-classifier": (llama_classifier, ["q_proj", "v_proj"], "SEQ_CLS"),
    "t5": (t5, ["q", "v", "wo"], "SEQ_2_SEQ_LM"),
    "bart": (bart, ["q_proj", "v_proj", "fc1"], "SEQ_2_SEQ_LM"),
}

#: Those whose memory tests look at, by name and bits.
MEASURED = {("vit", 32), ("wav2vec2", 32)}


def batch(name: str) -> dict[str, np.ndarray]:
    """What the transformers model of `name` takes with `labels`, and nothing else."""
    rng = np.random.default_rng(5)
    if name.startswith(("vit", "convnext")):
        size = 16 if name.startswith("vit") else 32
        arrays = {"pixel_values": rng.standard_normal((4, 3, size, size)).astype(np.float32)}
    elif name == "wav2vec2":
        arrays = {"input_values": rng.standard_normal((4, SAMPLES)).astype(np.float32)}
    else:
        arrays = dict(models.batch().arrays)
    if name == "bert-tokens":
        labels = rng.integers(0, 3, arrays["input_ids"].shape)
        return {**arrays, "labels": np.where(arrays["attention_mask"] == 1, labels, -100)}
    if name in ("t5", "bart"):
        labels = rng.integers(3, 320, (4, 6))
        labels[1, 4:] = -100
        labels[3, 2:] = -100
        return {**arrays, "labels": labels}
    if name == "bert-regression":
        return {**arrays, "labels": rng.standard_normal(4).astype(np.float32)}
    if name == "bert-regression-3":
        return {**arrays, "labels": rng.standard_normal((4, 3)).astype(np.float32)}
    if name.endswith("multi-label"):
        return {**arrays, "labels": rng.integers(0, 2, (4, 3)).astype(np.float32)}
    return {**arrays, "labels": rng.integers(0, 3, 4)}


def save_with_words(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """The model as a folder with a tokenizer of whole words, `w3` being token 3; `cut` is two tokens."""
    model.save_pretrained(str(folder))
    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, 300)}, "##t": 300, "cu": 301}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "vocab": vocabulary,
            "unk_token": "<pad>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
