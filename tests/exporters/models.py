"""Tiny random-weight models, adapters over them, and the weights of a bundle read back independently."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import torch
import transformers

from edgepeft.bundle.manifest import Manifest

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 320,
}


def bert_classifier(labels: int = 3) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, max_position_embeddings=64, num_labels=labels, initializer_range=0.2
    )
    return transformers.BertForSequenceClassification(config).eval()


def bert_encoder() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(**SIZES, max_position_embeddings=64, initializer_range=0.2)
    ).eval()


def llama(*, tied: bool, **sizes: int) -> transformers.PreTrainedModel:
    """Grouped heads: 4 of queries, 2 of keys and values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES | sizes,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(*, layers: int = 2, width: int = 64) -> transformers.PreTrainedModel:
    """Linears that keep their weights as `[in, out]`, positions that are looked up, and an output layer that
    is the embedding."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=width, n_layer=layers, n_head=4, n_positions=64, vocab_size=320, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def save_adapter(
    model: transformers.PreTrainedModel, folder: Path, seed: int, *, embeddings: bool = False, **config: Any
) -> Path:
    """A PEFT LoRA over `model`, its factors (and its head, if it saves one) random, as PEFT writes it."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(str(folder), save_embedding_layers=embeddings)
    wrapped.unload()
    return folder


def read_reference(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Decode the frozen matrices of a bundle from the bytes of `weights.bin`, by the formats' definitions.

    Not with the exporter's code: q4 holds `[N, K / block, block / 2]` bytes, low half first, with zero points
    laid out alike; q8 holds bytes with zero point 128; f16 holds halves; anything else is float32.
    """
    data = (folder / manifest.weights_file).read_bytes()

    def raw(name: str) -> np.ndarray:
        entry = manifest.weights[name]
        dtype = np.dtype(getattr(ml_dtypes, entry.dtype, entry.dtype))
        return np.frombuffer(data, dtype, entry.nbytes // dtype.itemsize, entry.offset).reshape(entry.shape)

    found = {}
    for name in manifest.weights:
        stem, _, suffix = name.rpartition(".")
        if suffix in ("q4", "q8") or (suffix == "rows" and stem.rpartition(".")[2] in ("q4", "q8")):
            if suffix == "rows":
                stem, _, suffix = stem.rpartition(".")
            scales = raw(f"{stem}.scales").astype(np.float32)

            def halves(packed: np.ndarray) -> np.ndarray:
                return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)

            codes = raw(name).reshape(scales.shape[0], -1)
            zero_points = np.full((*scales.shape, 1), 128)
            if suffix == "q4":
                codes = halves(codes)
                zero_points = halves(raw(f"{stem}.zero_points"))[:, : scales.shape[1], None]
            blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - zero_points
            found[stem] = torch.from_numpy((blocks * scales[..., None]).reshape(codes.shape))
        elif suffix == "f16":
            found[stem] = torch.from_numpy(raw(name).astype(np.float32))
    return found


def use_reference(model: torch.nn.Module, reference: dict[str, torch.Tensor]) -> None:
    """Put a bundle's weights into the PyTorch model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in reference:
                parameter.copy_(reference[name])


@dataclasses.dataclass
class Batch:
    """Right-padded random tokens, as torch and as numpy keyword arguments."""

    arrays: dict[str, np.ndarray]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


def batch(lengths: Sequence[int] = (9, 5, 7, 2), *, labels: int | str | None = None, seed: int = 0) -> Batch:
    """Tokens of the given lengths; `labels` is a number of classes, `"tokens"`, or None."""
    rng = np.random.default_rng(seed)
    width = max(lengths)
    ids = rng.integers(0, SIZES["vocab_size"], (len(lengths), width))
    mask = (np.arange(width)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if labels == "tokens":
        arrays["labels"] = np.where(mask == 1, ids, -100)
        arrays["labels"][0, :3] = -100  # a prompt
    elif labels is not None:
        arrays["labels"] = rng.integers(0, int(labels), len(lengths))
    return Batch(arrays)
