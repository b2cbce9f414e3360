"""Models in published shapes with random weights: time and memory do not depend on the values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import edgepeft

RANK = 8
#: Methods whose modules PEFT chooses.
PEFTS_OWN = ("ia3", "ln_tuning")
#: transformers' model with a head for each task.
HEADS = {
    "text-generation": transformers.AutoModelForCausalLM,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A model's published shape and the modules that get a LoRA in its benchmarks."""

    model_type: str
    config: dict[str, Any]
    targets: tuple[str, ...]
    task: str = "text-generation"

    def build(self) -> transformers.PreTrainedModel:
        """The model in float32, its weights drawn from a fixed seed."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        return HEADS[self.task].from_config(config).eval()


SHAPES = {
    "smollm2-135m": Shape(
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5,
        },
        ALL_LINEARS,
    ),
    "qwen2.5-0.5b": Shape(
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
        },
        ("q_proj", "v_proj"),
    ),
    "minilm-l6": Shape(
        "bert",
        {
            "vocab_size": 30522,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
        },
        ("query", "key", "value"),
        "text-classification",
    ),
    "vit-small": Shape(
        "vit",
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 224,
            "patch_size": 16,
        },
        ("q_proj", "v_proj"),
        "image-classification",
    ),
}

DECODERS = [name for name, shape in SHAPES.items() if shape.task == "text-generation"]


def bundle_of(
    shape: str,
    folder: Path,
    report: Callable[[str], None],
    targets: Sequence[str] | None = None,
    *,
    train: bool = True,
    method: str = "lora",
) -> Path:
    """The shape as a 4-bit bundle below `folder`, exported where it is not there yet: with slots of `method`
    on `targets`, on the shape's own or where PEFT has them, and with training graphs if it is to `train`."""
    bundle = folder / f"{shape}.edge"
    if not bundle.exists():
        chosen = SHAPES[shape]
        if targets is None and method not in PEFTS_OWN:
            targets = chosen.targets
        edgepeft.export(
            chosen.build(),
            bundle,
            task=chosen.task,
            rank=RANK,
            targets=targets,
            method=method,
            train=train,
            verify=False,
            quick=True,
            report=report,
        )
    return bundle
