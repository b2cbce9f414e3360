"""Models in published shapes with random weights: time and memory do not depend on the values."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder's published shape and the modules that get a LoRA in its benchmarks."""

    model_type: str
    config: dict[str, Any]
    targets: tuple[str, ...]

    def build(self) -> transformers.PreTrainedModel:
        """The model in float32, its weights drawn from a fixed seed."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


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
}
