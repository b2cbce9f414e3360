"""A model's parameters as float32 on the CPU, without holding them twice, or in memory at all."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..scratch import converted

_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def with_own_parameters(model: Any) -> Any:
    """A copy of a model that can be changed: its parameters are others, with the same values in the same
    memory, so that their `data` may be replaced, but not written to."""
    own: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, own)


def stored_dtype(model: str) -> torch.dtype:
    """What a folder's weights are stored as, where that is one of the 16-bit floats for all of them, else
    float32."""
    try:
        dtypes = {
            file.get_slice(name).get_dtype()
            for path in Path(model).glob("*.safetensors")
            for file in _opened(path)
            for name in file.keys()  # noqa: SIM118, it is no mapping
        }
    except (SafetensorError, OSError):  # which loading will tell
        return torch.float32
    return _HALVES.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32


def _opened(path: Path) -> Iterator[Any]:
    with safe_open(path, framework="pt") as file:
        yield file


def has_rounded_buffers(model: Any) -> bool:
    """Whether a model has computed something in a shorter float than float32 when it was made."""
    return any(buffer.dtype in _HALVES.values() for buffer in model.buffers())


def to_float32(model: Any) -> Any:
    """The model with float32 parameters, on the CPU; large ones that were none are in scratch files.

    Raises:
        ExportError: there is no room for them.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = converted(parameter.data.cpu(), torch.float32)
    model.config.dtype = torch.float32
    return model.float().cpu()
