"""A transformers checkpoint whose weights are quantized already, as a float32 model and its codes.

The model holds what the codes stand for, in float32 and not rounded to the type that its own library computes
in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from edgepeft.errors import ExportError

from ...quantize.table_weight import StoredWeight
from ...scratch import converted
from ..model_files import read_json
from ..quiet import quiet
from ..settings import GENERATION
from ..tasks import model_class
from ..tied_weights import canonical_names
from .awq import AwqLayout
from .bitsandbytes import BitsAndBytesLayout
from .compressed_tensors import CompressedTensorsLayout
from .gptq import GptqLayout
from .layout import Layout
from .mlx import MlxLayout
from .tensors import FLOATS, CheckpointTensors
from .torchao import TorchaoLayout

#: By `quant_method`; mlx-lm notes none.
LAYOUTS: dict[str, type[Layout]] = {
    "gptq": GptqLayout,
    "awq": AwqLayout,
    "bitsandbytes": BitsAndBytesLayout,
    "compressed-tensors": CompressedTensorsLayout,
    "torchao": TorchaoLayout,
    "mlx": MlxLayout,
}
#: Where config.json describes it; the latter is mlx-lm's.
_KEYS = ("quantization_config", "quantization")


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration says that its weights are quantized."""
    return any(config.get(key) for key in _KEYS)


def quantized_layout(folder: Path, config: Mapping[str, Any]) -> Layout | None:
    """How the weights of a folder are quantized; None where they are floats.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        ExportError: in a way that is not known, which the message names, or its files cannot be read.
    """
    settings = next((config[key] for key in _KEYS if config.get(key)), None)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ExportError(f"{folder}: quantization_config of config.json is {settings!r}, expected an object")
    method = _method(settings)
    layout = LAYOUTS.get(method)
    if layout is None:
        raise ExportError(
            f"{folder}: its weights are quantized already ({method}), which edgepeft does not read: export "
            "the float model that it was made of, or this one as saved after model.dequantize()"
        )
    found = layout(CheckpointTensors(folder), settings)
    if not found.modules():
        raise ExportError(
            f"{folder}: config.json says that its weights are quantized already ({method}), but no module "
            f"has a {found.marker}: take that out of config.json if they are floats, or export the float "
            "model that it was made of"
        )
    return found


def _method(settings: Mapping[str, Any]) -> str:
    if "quant_method" in settings:
        return str(settings["quant_method"])
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return "mlx" if "group_size" in settings else "quantization_config"


def load_quantized(folder: Path, task: str, heads: Mapping[str, Any]) -> tuple[Any, dict[str, StoredWeight]]:
    """The model that a folder holds, float32, and its quantized weights by state-dict key.

    A weight has its outputs as rows, where GPT-2's parameter has them as columns. A tied one goes by the name
    that `canonical_names` gives it.

    Args:
        folder: holds config.json and safetensors.
        task: of `TASKS`.
        heads: settings of a new classification head (`num_labels`, …); empty where there is none.

    Raises:
        ExportError: the description and the tensors do not fit each other or the model, or are of a kind that
            is not known.
    """
    description = read_json(str(folder), "config.json") or {}
    layout = quantized_layout(folder, description)
    if layout is None:
        raise ExportError(f"{folder}: config.json does not say that its weights are quantized")
    resized = dict(heads)
    ignore = bool(resized.pop("ignore_mismatched_sizes", False))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **resized)
    for key in _KEYS:
        if hasattr(config, key):
            delattr(config, key)
    config.dtype = torch.float32
    auto: Any = model_class(task, config.model_type)
    with quiet():
        with torch.device("meta"):
            skeleton = auto.from_config(config, trust_remote_code=False)
        weights, names = _read_weights(layout, skeleton)
        state = _decoded(layout, weights, names, skeleton)
        model, report = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            ignore_mismatched_sizes=ignore,
            output_loading_info=True,
        )
        if (folder / GENERATION).is_file() and hasattr(model, "generation_config"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    _check_complete(layout, model, report, has_new_head=bool(heads))
    return model, _by_parameter(layout, model, weights, names, state)


def _read_weights(layout: Layout, skeleton: Any) -> tuple[dict[str, StoredWeight], dict[str, str]]:
    """The weights by the names of their modules in the checkpoint, and by these the names in the model.

    What the model does not have (a base model no output layer) is left out, as transformers leaves it out.
    """
    modules = dict(skeleton.named_modules())
    prefix = f"{skeleton.base_model_prefix}."
    weights: dict[str, StoredWeight] = {}
    names: dict[str, str] = {}
    for module in layout.modules():
        spelled = (module, module.removeprefix(prefix), f"{prefix}{module}")
        name = next((name for name in spelled if name in modules), None)
        if name is None:
            continue
        weight = getattr(modules[name], "weight", None)
        if weight is None or weight.ndim != 2:
            raise layout.tensors.error(
                module, f"is quantized, but a {type(modules[name]).__name__} in the model, expected a linear"
            )
        rows, columns = weight.shape
        shape = (columns, rows) if isinstance(modules[name], Conv1D) else (rows, columns)
        weights[module], names[module] = layout.weight(module, shape), name
    if not weights:
        raise layout.tensors.error(layout.modules()[0], f"is no module of {type(skeleton).__name__}")
    return weights, names


def _decoded(
    layout: Layout, weights: Mapping[str, StoredWeight], names: Mapping[str, str], skeleton: Any
) -> dict[str, torch.Tensor]:
    """All parameters float32, by their names in the checkpoint."""
    state: dict[str, torch.Tensor] = {}
    for module, weight in weights.items():
        values = weight.dequantize()
        turned = isinstance(skeleton.get_submodule(names[module]), Conv1D)
        state[f"{module}.weight"] = converted(values.T, torch.float32) if turned else values
    for name in layout.floats():
        if layout.tensors.dtype(name) in FLOATS:
            state[name] = converted(layout.tensors.read(name), torch.float32)
    return state


def _check_complete(layout: Layout, model: Any, report: Mapping[str, Any], *, has_new_head: bool) -> None:
    """Refuse a model that transformers has drawn weights for, other than those of its new head.

    Raises:
        ExportError: names one of them.
    """
    drawn = list(report["missing_keys"])
    drawn += [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    base = f"{model.base_model_prefix}."
    if has_new_head:
        drawn = [name for name in drawn if name.startswith(base)]
    if not drawn:
        return
    name = next((name for name in drawn if name in layout.tensors), min(drawn))
    if name not in layout.tensors:
        raise layout.tensors.error(name, f"is not there as {type(model).__name__} has it")
    raise layout.tensors.error(
        name,
        f"is stored as {layout.tensors.dtype(name)} {list(layout.tensors.shape(name))}, expected "
        f"{list(model.get_parameter(name).shape)} floats",
    )


def _by_parameter(
    layout: Layout,
    model: Any,
    weights: Mapping[str, StoredWeight],
    names: Mapping[str, str],
    state: Mapping[str, torch.Tensor],
) -> dict[str, StoredWeight]:
    """The weights by state-dict key.

    Raises:
        ExportError: a parameter does not hold what its weight stands for, as it is tied with another.
    """
    canonical = canonical_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, StoredWeight] = {}
    for module, weight in weights.items():
        key = f"{names[module]}.weight"
        stored = state[f"{module}.weight"]
        if not _is_same(parameters[key].detach(), stored):
            raise layout.tensors.error(module, "is tied with another weight, which has other values")
        found[canonical[key]] = weight
    return found


def _is_same(parameter: torch.Tensor, stored: torch.Tensor) -> bool:
    return parameter.data_ptr() == stored.data_ptr() or torch.equal(parameter, stored)
