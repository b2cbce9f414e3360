"""A transformers model that is to be exported, with what its folder says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from edgepeft.bundle.manifest import TextSettings

from ..quantize.table_weight import StoredWeight
from .base import Pooling


@dataclass
class LoadedModel:
    """A model ready to be traced: float32, on the CPU, in evaluation mode, nothing requiring gradients.

    Attributes:
        shipped: the folder or hub id that it came from.
        quantized: by the names of the trace, weights that were quantized there; the model has their values.
        whole_vocab_size: tokens that it came with, where some of them were taken out.
    """

    model: Any  # a transformers PreTrainedModel; its modules are looked up by name
    task: str
    name: str
    pooling: Pooling | None = None
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    text_settings: TextSettings = field(default_factory=TextSettings)
    tokenizer: Any = None  # transformers' own, to compare with
    max_length: int = 0
    shipped: str | None = None
    quantized: Mapping[str, StoredWeight] = field(default_factory=dict)
    whole_vocab_size: int | None = None

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def max_positions(self) -> int | None:
        """Tokens the model has positions for; None where any number will do (ALiBi)."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def architecture(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def problem_type(self) -> str | None:
        """transformers' `problem_type` of a classifier of texts or images, which decides its loss; None else.

        Where the configuration names none, one output is a regression and several are classes, as
        transformers has it.
        """
        if self.task not in ("text-classification", "image-classification"):
            return None
        declared: str | None = getattr(self.config, "problem_type", None)
        return declared or ("regression" if self.config.num_labels == 1 else "single_label_classification")

    @property
    def length_unit(self) -> int:
        """Samples of a waveform that make one frame of features; 1 for tokens."""
        return math.prod(self.config.conv_stride) if self.task == "audio-classification" else 1

    @property
    def min_length(self) -> int:
        """Shortest input: samples that the feature encoder needs for two frames; 1 for tokens."""
        if self.task != "audio-classification":
            return 1
        samples = 2
        for kernel, stride in reversed(
            list(zip(self.config.conv_kernel, self.config.conv_stride, strict=True))
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def module_names(self) -> list[str]:
        """Names of all modules."""
        return [name for name, _ in self.model.named_modules()]

    def parameter_names(self) -> set[str]:
        """Names of all parameters, a shared one by each of its names."""
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def linear_names(self) -> list[str]:
        """Names of the linear modules but the output head of a language model."""
        head = self.model.get_output_embeddings()
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        ]

    def has_matrix(self, module: str) -> bool:
        """Whether `module` is there and has a two-dimensional weight."""
        weight = getattr(dict(self.model.named_modules()).get(module), "weight", None)
        return weight is not None and weight.ndim == 2

    def parameters(self, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Those whose names begin so."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: value.detach() for name, value in named if name.startswith(prefixes)}

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Of PyTorch's linears, and of those that GPT-2 has transposed."""
        found: dict[str, tuple[int, int]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                rows, columns = module.weight.shape
                found[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
        return found
