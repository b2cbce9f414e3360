"""A transformers model as a source: its one trace, and what its processors do with pictures and sounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from edgepeft.bundle.manifest import AudioPreprocessing, ImagePreprocessing

from ..graph import tidy
from ..passes.drop_cache import drop_cache
from ..passes.shapes.from_inputs import take_sizes_from_inputs
from .base import Traced
from .loaded_model import LoadedModel
from .peft_patterns import check_patterns
from .preprocessing import read_audio_preprocessing, read_image_preprocessing
from .samples import keeps_keys_and_values, run_once, sample_inputs
from .sentence_classifier import SentenceClassifier
from .tied_weights import find_lookups
from .tokenizer import TokenizerFiles, read_tokenizer
from .tracing import conv1d_weights, trace


@dataclass
class Source(LoadedModel):
    """See `ModelSource`. `traced` is the graph once it was asked for."""

    traced: Traced | None = None

    def use_tokenizer(self, folder: str) -> None:
        """Take the tokenizer of an adapter's folder instead.

        Raises:
            ExportError: it has a setting that the runtime does not know.
        """
        text = read_text(folder, self.task, self.model)
        self.tokenizer_files |= text.files
        self.text_settings, self.tokenizer = text.settings, text.tokenizer

    @property
    def image_preprocessing(self) -> ImagePreprocessing | None:
        """What the model's image processor does; None where it has none of those that the runtime knows, or
        one that makes another size than the model takes."""
        if self.task != "image-classification" or self.shipped is None:
            return None
        found = read_image_preprocessing(self.shipped)
        pixels = sample_inputs(self, with_past=False).inputs["pixel_values"]
        if found is None or (len(found.mean), *found.output_size) != tuple(pixels.shape[1:]):
            return None
        return found

    @property
    def audio_preprocessing(self) -> AudioPreprocessing | None:
        """What the model's feature extractor does; None where it has none that the runtime knows."""
        if self.task != "audio-classification" or self.shipped is None:
            return None
        return read_audio_preprocessing(self.shipped)

    @property
    def quantization(self) -> None:
        """Nothing is quantized yet."""
        return None

    @property
    def own_training_graph(self) -> bool:
        """A language model has a cache, as a rule, which training has no use for."""
        return self.task == "text-generation"

    def check_patterns(self, folder: Path) -> None:
        """See `peft_patterns`."""
        check_patterns(folder, self.model)

    def resolve_targets(self, targets: Sequence[str]) -> list[str]:
        """Targets as they are: suffixes of module names."""
        return list(targets)

    def trace(self, *, training: bool) -> Traced:
        """A copy of the model's one trace (see `tracing.trace`); for training without its cache."""
        if self.traced is None:
            # A model that keeps something else reads the whole text for every token.
            with_past = self.task == "text-generation" and keeps_keys_and_values(self)
            self.traced = trace(self, with_past=with_past)
        traced = self.traced.copy()
        traced.turned = frozenset(conv1d_weights(self.model))
        traced.lookups = find_lookups(self.model)
        if training:
            drop_cache(traced.model.graph)
            take_sizes_from_inputs(traced.model.graph)
            tidy(traced.model)
        return traced

    def called_linears(self) -> set[str]:
        """Names of the linear modules that the model calls.

        Some models hand a linear's weight to a function instead (WavLM's attention): PEFT wraps the call, so
        its LoRA would do nothing there.
        """
        called: set[str] = set()
        hooks = [
            module.register_forward_hook(lambda *_, name=name: called.add(name))
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        ]
        try:
            run_once(self, sample_inputs(self, with_past=False).inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return called


def read_text(folder: str, task: str, module: Any) -> TokenizerFiles:
    """The tokenizer of a folder, as the task uses it.

    Raises:
        ExportError: it has a setting that the runtime does not know.
    """
    embeds = task == "feature-extraction" or isinstance(module, SentenceClassifier)
    return read_tokenizer(folder, embeds=embeds, writes=task.endswith("-generation"))
