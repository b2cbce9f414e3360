"""A LoRA of a base that its initialization changed (PiSSA, OLoRA), as a plain one of the base as it was.

    W + s (B A - B₀ A₀) = W + s [B | -B₀] [A; A₀]

`B₀ A₀` is what PEFT computes of `W` when it opens such a folder; here it does so for one module at a time.
The same as PEFT writes where the start was kept (`LoraModel.subtract_mutated_init`), but that what is stored
whole is kept, and that rsLoRA goes with patterns.
"""

import copy
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from edgepeft.adapters import CONFIG_FILE, PREFIX, TENSOR_FILE, Adapter, load_adapter, write_adapter
from edgepeft.errors import AdapterError
from edgepeft.files import atomic_write
from edgepeft.initialization import OPTION, REPEATABLE

from ..sources.base import ModelSource
from ..sources.transformers_model import Source


def is_repeatable(folder: Path) -> bool:
    """Whether the folder is of a LoRA whose initialization changes the base in the same way each time."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # which its reader says better
    return isinstance(config, dict) and config.get("peft_type") == "LORA" and config.get(OPTION) in REPEATABLE


def as_plain(folder: Path, source: ModelSource, converted: Path) -> None:
    """Write the adapter in `folder` as a plain LoRA of twice the rank to `converted`, a new folder.

    Raises:
        AdapterError: the adapter cannot be used, or the source does not have the weights that it is of.
    """
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    converted.mkdir(parents=True)
    atomic_write(converted / CONFIG_FILE, json.dumps({**config, OPTION: True}).encode())
    shutil.copyfile(folder / TENSOR_FILE, converted / TENSOR_FILE)
    adapter = load_adapter(converted)
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        start = _start(adapter, module, source, str(config[OPTION]), str(folder))
        a, b = (f"{PREFIX}{module}.lora_{name}.weight" for name in "AB")
        tensors[a] = np.concatenate([tensors[a], start["lora_A"]], 0)
        tensors[b] = np.concatenate([tensors[b], -start["lora_B"]], 1)
    # s = alpha / r, or with rsLoRA alpha / sqrt(r), stays.
    grows = math.sqrt(2) if config.get("use_rslora") else 2
    plain = {
        **adapter.config,
        "r": 2 * adapter.config["r"],
        "lora_alpha": grows * adapter.config.get("lora_alpha", 8),
        "rank_pattern": {key: 2 * value for key, value in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: grows * value for key, value in (config.get("alpha_pattern") or {}).items()},
    }
    write_adapter(Adapter(plain, tensors, str(folder), adapter.base, adapter.labels), converted)


def _start(
    adapter: Adapter, module: str, source: ModelSource, initialization: str, origin: str
) -> Mapping[str, np.ndarray]:
    """PEFT's factors of an adapter on the module before it is trained, `lora_A` and `lora_B`."""
    if not isinstance(source, Source) or not source.has_matrix(module):
        raise AdapterError(
            f"{origin}: {OPTION}={initialization!r} took a part of the weights of {module}, and "
            f"{source.name} has no such module in PyTorch: export the model that it was trained on"
        )
    if f"{module}.weight" in source.quantized:
        raise AdapterError(
            f"{origin}: {OPTION}={initialization!r} took a part of the float weights of {module}, and those "
            f"of {source.name} are rounded already: export the float model that it was trained on"
        )
    rank = adapter.rank(module)
    of_one: dict[str, Any] = {
        "r": rank,
        "lora_alpha": adapter.scaling(module) * rank,
        OPTION: initialization,
        "target_modules": ["linear"],
    }
    holder = torch.nn.ModuleDict({"linear": copy.deepcopy(source.model.get_submodule(module))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a Conv1D is transposed
        layer: Any = peft.inject_adapter_in_model(peft.LoraConfig(**of_one), holder).get_submodule("linear")
    return {
        name: getattr(layer, name)["default"].weight.detach().float().numpy() for name in ("lora_A", "lora_B")
    }
