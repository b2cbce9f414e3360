"""What the exporter asks of a model, wherever it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch

from edgepeft.bundle.manifest import AudioPreprocessing, ImagePreprocessing, Quantization, TextSettings

from ..quantize.table_weight import StoredWeight


@dataclass(frozen=True)
class Pooling:
    """How texts become sentence embeddings.

    Attributes:
        mode: of token embeddings: `mean`, `cls` or `max`.
        normalize: divide by the norm.
        prompts: texts that may be put before a text, by name.
        default_prompt: name of the one that is unless told otherwise.
    """

    mode: str = "mean"
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


@dataclass(frozen=True)
class Lookup:
    """An embedding module of PyTorch's.

    Attributes:
        weight: the name that its table goes by, which a tied layer may have, too.
        padding_idx: the row that gets no gradient.
        alone: whether no other embedding looks rows of the table up.
    """

    weight: str
    padding_idx: int | None
    alone: bool


@dataclass
class Traced:
    """A forward graph, not optimized yet.

    Attributes:
        weights: the graph inputs that hold weights, to be bound or lifted later.
        packed: linears that compute several modules at once, with the width of each, in order.
        turned: those of `weights` that PyTorch has transposed.
        lookups: embeddings, where PyTorch says more of them than the graph.
    """

    model: ir.Model
    weights: dict[str, torch.Tensor]
    packed: dict[str, dict[str, int]] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()
    lookups: dict[str, Lookup] = field(default_factory=dict)

    def copy(self) -> "Traced":
        """The same graph once more, to be changed; the weights are shared."""
        return Traced(self.model.clone(), dict(self.weights), self.packed)


class ModelSource(Protocol):
    """A model to export: transformers (`transformers_model.Source`) or a file (`onnx_file.OnnxFile`).

    `quantized` has, by state-dict key, weights that are quantized already and are stored as they are.
    """

    task: str
    name: str
    pooling: Pooling | None
    tokenizer_files: dict[str, bytes]
    text_settings: TextSettings
    tokenizer: Any
    max_length: int
    quantized: Mapping[str, StoredWeight]

    @property
    def config(self) -> Any:
        """The transformers configuration, or what stands for it."""

    @property
    def architecture(self) -> str:
        """Name of the model's class, or of what wrote the file."""

    @property
    def quantization(self) -> Quantization | None:
        """How the weights are stored already; None where they are floats."""

    @property
    def problem_type(self) -> str | None:
        """transformers' `problem_type` of a classifier of texts or images, which decides its loss."""

    @property
    def length_unit(self) -> int:
        """Samples of a waveform that make one frame of features; 1 for tokens."""

    @property
    def min_length(self) -> int:
        """Shortest input: samples that the feature encoder needs for two frames; 1 for tokens."""

    @property
    def image_preprocessing(self) -> ImagePreprocessing | None:
        """What makes pixels of images; None where the runtime cannot."""

    @property
    def audio_preprocessing(self) -> AudioPreprocessing | None:
        """What makes samples of recordings; None where the runtime cannot."""

    @property
    def own_training_graph(self) -> bool:
        """Whether the graph to train differs from the one to infer with."""

    def module_names(self) -> list[str]:
        """Names of all modules."""

    def parameter_names(self) -> set[str]:
        """Names of all parameters that an adapter could replace."""

    def parameters(self, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The parameters whose names begin with one of `prefixes`, as PyTorch has them, by name."""

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """`(out_features, in_features)` of every linear module, by name."""

    def linear_names(self) -> list[str]:
        """Names of the linear modules but the output head of a language model."""

    def called_linears(self) -> set[str]:
        """Names of the linear modules that a LoRA has an effect on."""

    def has_matrix(self, module: str) -> bool:
        """Whether `module` is there and has a two-dimensional weight."""

    def check_patterns(self, folder: Path) -> None:
        """Refuse an adapter whose patterns PEFT could not match with the modules in a reasonable time.

        Raises:
            AdapterError: names the file.
        """

    def resolve_targets(self, targets: Sequence[str]) -> list[str]:
        """Targets as a user names them, as (suffixes of) module names."""

    def trace(self, *, training: bool) -> Traced:
        """The forward graph: with a key/value cache, where the model has one, unless it is for training."""
