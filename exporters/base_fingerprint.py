"""What tells a base model from another of its shape: a hash of its configuration and of sampled weights.

It is taken of the model as it came, before anything is rounded, so that bundles of 4, 8 and 32 bits of one
base have the same. A classifier's head does not count: it may be drawn at random, and adapters bring their
own.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .sources.base import ModelSource
from .sources.model_info import saved_module_names
from .sources.onnx_file import OnnxFile
from .sources.onnx_graph import read_graph
from .sources.transformers_model import Source

#: Values of each weight that count.
_SAMPLES = 64
#: A prime, so that multiples of it modulo a weight's size are spread over rows and columns alike.
_STRIDE = 2_654_435_761
#: Below it float16 rounds what bfloat16 holds.
_SMALLEST = 2.0**-16
#: Of a configuration, what does not change what the model computes: where it came from, how it is stored,
#: trained and called, and what its outputs and tokens are named.
_NOT_COMPUTED = re.compile(
    r"_.*|transformers_version|architectures|(torch_)?dtype|quantization_config"
    r"|initializer_.*|init_std|.*drop.*|gradient_checkpointing"
    r"|use_cache|return_dict|output_(attentions|hidden_states|scores)"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|.*_token_id"
)


def base_fingerprint(source: ModelSource) -> str:
    """SHA-256 (hex) of the base model.

    Sampled values are rounded to bfloat16, so a checkpoint's copies in float32 and in bfloat16 have the same
    fingerprint, and a bfloat16 checkpoint's copy in float16 has it too. That of a float32 checkpoint may have
    another: no rounding undoes the rounding to float16.
    """
    digest = hashlib.sha256()
    if isinstance(source, OnnxFile):
        graph = read_graph(source.path).graph
        told: Any = [f"{node.domain}:{node.op_type}" for node in graph]
        weights: Iterable[tuple[str, npt.NDArray[Any]]] = (
            (name, value.const_value.numpy())
            for name, value in graph.initializers.items()
            if value.const_value is not None
        )
    else:
        assert isinstance(source, Source)
        told = _computed(source.config.to_dict())
        heads = tuple(f"{name}." for name in saved_module_names(source, ()))
        weights = (
            (name, parameter.detach().numpy())
            for name, parameter in source.model.named_parameters()
            if not name.startswith(heads)
        )
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, values in weights:
        digest.update(f"\n{name} {list(values.shape)} ".encode())
        digest.update(_sampled(values))
    return digest.hexdigest()


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that the computation depends on. What is off does not count: a later
    transformers has more that can be switched on."""
    return {
        key: _computed(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value not in (None, False) and not _NOT_COMPUTED.fullmatch(key)
    }


def _sampled(values: npt.NDArray[Any]) -> bytes:
    """Values at fixed places, as copies of other float types have them, too."""
    if not values.size:
        return b""
    places = np.arange(_SAMPLES) * _STRIDE % values.size
    with np.errstate(over="ignore"):
        sampled = values.reshape(-1)[places].astype(np.float32)
    rounded = torch.from_numpy(sampled).bfloat16().float().numpy()
    return np.where(np.abs(rounded) < _SMALLEST, np.float32(0), rounded).astype("<f4").tobytes()
