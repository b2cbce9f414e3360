"""A fresh adapter as PEFT makes it: the point from which a device starts to learn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from edgepeft.adapters import CONFIG_FILE, PREFIX, TASK_TYPES, Adapter, write_adapter
from edgepeft.errors import ExportError, UsageError

from ..options import ExportOptions
from ..passes.weights.linears import select
from ..sources.base import ModelSource
from ..sources.model_info import default_targets, saved_module_names


def write_fresh_adapter(source: ModelSource, folder: Path, options: ExportOptions) -> None:
    """Write a LoRA with a random A and a zero B, and the model's own head of a classifier, to `folder`.

    The configuration and the keys are PEFT's; A is drawn from its distribution, uniform within 1 /
    sqrt(in_features). No module is wrapped: the model's sizes are all that it takes.

    Raises:
        UsageError: the rank is not positive, or a target matches no linear.
    """
    rank = options.rank
    if rank is None or rank < 1:
        raise UsageError(f"--rank must be at least 1, got {rank}")
    if options.targets is not None and not options.targets:
        raise UsageError("--rank makes a LoRA, and --targets names nothing that takes one: leave out --rank")
    targets = list(options.targets) if options.targets is not None else default_targets(source)
    heads = saved_module_names(source, ())
    saved = [name for name in heads if not name.startswith(tuple(f"{head}." for head in heads))]
    parameters = source.parameters(tuple(f"{name}." for name in saved))
    saved = [name for name in saved if any(key.startswith(f"{name}.") for key in parameters)]
    config = peft.LoraConfig(
        base_model_name_or_path=source.name,
        task_type=TASK_TYPES.get(source.task),
        modules_to_save=saved or None,
        r=rank,
        lora_alpha=options.lora_alpha if options.lora_alpha is not None else 2 * rank,
        target_modules=targets,
        lora_dropout=options.lora_dropout,
        inference_mode=True,
    )
    try:
        chosen = select(source.linear_sizes(), targets)
    except ExportError as error:
        raise UsageError(f"--targets {','.join(targets)}: {error}") from error
    generator = torch.Generator().manual_seed(options.seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (out_features, in_features) in chosen.items():
        key, bound = f"{PREFIX}{module}", 1 / math.sqrt(in_features)
        a = (2 * torch.rand(rank, in_features, generator=generator) - 1) * bound
        tensors[f"{key}.lora_A.weight"] = a.numpy()
        tensors[f"{key}.lora_B.weight"] = np.zeros((out_features, rank), np.float32)
    tensors |= {f"{PREFIX}{name}": value.float().numpy() for name, value in parameters.items()}
    config.save_pretrained(str(folder))
    write_adapter(Adapter(_settings(folder), tensors, str(folder)), folder)


def _settings(folder: Path) -> dict[str, Any]:
    """PEFT's configuration as it was saved, its set of targets in an order: equal exports are equal files."""
    settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return settings | {"target_modules": sorted(settings["target_modules"])}
