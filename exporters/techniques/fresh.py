"""A fresh adapter as PEFT makes it: the point from which a device starts to learn."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from edgepeft.adapters import CONFIG_FILE, PREFIX, TASK_TYPES, Adapter, write_adapter
from edgepeft.errors import UsageError

from ..passes.weights.linears import select
from ..sources.base import ModelSource
from ..sources.model_info import default_targets, saved_module_names
from ..sources.onnx_file import OnnxFile
from ..sources.transformers_model import Source


@dataclass(frozen=True)
class LoraOptions:
    """What a fresh LoRA looks like.

    Attributes:
        targets: suffixes of module names; None: every linear but the output head.
        lora_alpha: twice the rank where None.
        seed: draws A.
    """

    rank: int
    targets: Sequence[str] | None
    lora_alpha: int | None
    seed: int

    def config(self, source: ModelSource) -> peft.LoraConfig:
        """PEFT's configuration.

        Raises:
            UsageError: the rank is not positive.
        """
        if self.rank < 1:
            raise UsageError(f"--rank must be at least 1, got {self.rank}")
        return peft.LoraConfig(
            task_type=TASK_TYPES.get(source.task),
            modules_to_save=None if source.task in TASK_TYPES else list(saved_module_names(source, ())),
            r=self.rank,
            lora_alpha=self.lora_alpha if self.lora_alpha is not None else 2 * self.rank,
            target_modules=list(self.targets) if self.targets is not None else default_targets(source),
            lora_dropout=0.0,
        )


def write_starting_adapter(source: Source, folder: Path, options: LoraOptions) -> None:
    """Write a LoRA with a random A and a zero B (and the model's own head, for a classifier) to `folder`.

    Raises:
        UsageError: the rank is not positive, or the targets match nothing.
    """
    config = options.config(source)
    torch.manual_seed(options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(source.model, config)
        except ValueError as error:
            if options.targets is None:
                raise UsageError(f"a LoRA on every linear: {error} Name others with --targets") from error
            raise UsageError(f"--targets {','.join(options.targets)}: {error}") from error
        # Not embeddings: an adapter does not train them, and asking the hub whether it should needs a
        # network.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        source.model = model.unload()
    (folder / CONFIG_FILE).write_text(json.dumps(_settings(folder), indent=2), encoding="utf-8")
    source.model.requires_grad_(False)


def write_file_adapter(source: OnnxFile, folder: Path, options: LoraOptions) -> None:
    """The same for an ONNX file, which has no modules to give to PEFT: its configuration and keys, over the
    sizes that the graph has. A is drawn from PEFT's distribution, uniform within 1 / sqrt(in_features).

    Raises:
        UsageError: the rank is not positive.
        ExportError: a target matches no linear.
    """
    config = options.config(source)
    generator = torch.Generator().manual_seed(options.seed)
    targets = options.targets if options.targets is not None else default_targets(source)
    chosen = select(source.linears(), targets)
    tensors: dict[str, np.ndarray] = {}
    for module, linear in chosen.items():
        key = f"{PREFIX}{module}"
        bound = 1 / math.sqrt(linear.in_features)
        a = (2 * torch.rand(options.rank, linear.in_features, generator=generator) - 1) * bound
        tensors[f"{key}.lora_A.weight"] = a.numpy()
        tensors[f"{key}.lora_B.weight"] = np.zeros((linear.out_features, options.rank), np.float32)
    saved = [name for name in saved_module_names(source, ()) if f"{name}.weight" in source.weights]
    config.modules_to_save = saved or None
    for module in saved:
        for parameter in ("weight", "bias"):
            if (value := source.weights.get(f"{module}.{parameter}")) is not None:
                tensors[f"{PREFIX}{module}.{parameter}"] = value.numpy()
    config.save_pretrained(str(folder))
    write_adapter(Adapter(_settings(folder), tensors, str(folder)), folder)


def _settings(folder: Path) -> dict[str, Any]:
    """PEFT's configuration as it was saved, its set of targets in an order: equal exports are equal files."""
    settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    targets = settings["target_modules"]
    return settings | {"target_modules": sorted(targets) if isinstance(targets, list) else targets}
