"""PyTorch's side of a verification: a task's output, its loss and the gradients."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from edgepeft.adapters import Adapter
from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.inputs import BASE_LOGITS, IGNORED_LABEL
from edgepeft.virtual_tokens import KEY

from ..losses.contrastive import SCALE
from ..losses.triplet import MARGIN
from ..sources.base import Pooling
from ..sources.tracing import conv1d_weights
from ..sources.transformers_model import Source
from .batch import Arrays

# What PEFT's names of parameters have beside the keys.
_WRAPPED = re.compile(
    r"(?<=\.lora_magnitude_vector)\.default\.weight$"
    r"|\.(modules_to_save\.)?default(?=\.|$)|\.base_layer(?=\.bias$)"
)
_PROMPT = "prompt_encoder.embedding.weight"
TAKEN = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_values")


class BundleWeights:
    """The values that a bundle holds, in the place of a model's own."""

    def __init__(self, model: Any, bundle: Bundle, reference: Mapping[str, torch.Tensor]) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._turned = conv1d_weights(model)
        self._reference, self._bundle = reference, bundle
        self._versions: dict[str, int] = {}

    def freeze(self) -> None:
        """Give the frozen parameters the bundle's values, where they do not have them or were written to."""
        for name in self._reference.keys() & self._parameters.keys():
            parameter = self._parameters[name]
            if self._versions.get(name) != parameter._version:
                value = self._reference[name]
                parameter.data = value.T if name in self._turned else value
                self._versions[name] = parameter._version

    def reset(self) -> None:
        """Give the others, which an adapter may replace, the base's own values."""
        for tensor in self._bundle.manifest.adapter_inputs.values():
            if tensor.default is not None and tensor.default in self._parameters:
                value = np.array(self._bundle.read_weight(tensor.default))
                self._parameters[tensor.default].data = torch.from_numpy(value)


def torch_drift(logits: torch.Tensor, batch: Arrays) -> torch.Tensor:
    """KL divergence from the base model's distribution, averaged over the positions that count."""
    base, adapted = (torch.log_softmax(z, -1) for z in (torch.from_numpy(batch[BASE_LOGITS]), logits))
    each = torch.nn.functional.kl_div(adapted, base, reduction="none", log_target=True).sum(-1)
    if each.ndim == 1:
        return each.mean()
    counted = batch["labels"] != IGNORED_LABEL if "decoder_input_ids" in batch else batch["attention_mask"]
    return each[torch.from_numpy(counted).bool()].mean()


def torch_output(
    source: Source, model: Any, batch: Arrays, named_loss: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The task's output and loss as PyTorch computes them."""
    inputs = {name: torch.from_numpy(batch[name]) for name in TAKEN if name in batch}
    with warnings.catch_warnings():  # of how PEFT calls transformers with a prefix
        warnings.simplefilter("ignore", FutureWarning)
        if source.pooling is None:
            result = model(**inputs, labels=_labels(model, batch))
            return result.logits, result.loss
        embedding = _embedding(source.pooling, model, inputs)
    if named_loss == "triplet":
        anchor, positive, negative = embedding.chunk(3)
        return embedding, torch.nn.functional.triplet_margin_loss(anchor, positive, negative, margin=MARGIN)
    anchors, positives = torch.nn.functional.normalize(embedding, dim=-1).chunk(2)
    scores = SCALE * anchors @ positives.T
    return embedding, torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def _labels(model: Any, batch: Arrays) -> torch.Tensor:
    """The labels as the model takes them: in front of those of tokens PEFT puts others for its virtual tokens
    where it generates, and leaves it to its user elsewhere."""
    labels = torch.from_numpy(batch["labels"])
    if not isinstance(model, peft.PeftModel) or not model.active_peft_config.is_prompt_learning:
        return labels
    if labels.shape != batch["input_ids"].shape or isinstance(model, peft.PeftModelForCausalLM):
        return labels
    virtual = model.active_peft_config.num_virtual_tokens
    return torch.nn.functional.pad(labels, (virtual, 0), value=IGNORED_LABEL)


def _embedding(pooling: Pooling, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
    virtual = hidden.shape[1] - mask.shape[1]  # which sentence-transformers counts too
    mask = torch.nn.functional.pad(mask, (virtual, 0), value=1)
    if pooling.mode == "mean":
        mask = mask.unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    elif pooling.mode == "max":
        mask = mask.unsqueeze(-1)
        pooled = hidden.masked_fill(mask == 0, -1e9).amax(1)
    else:
        pooled = hidden[:, 0]
    return torch.nn.functional.normalize(pooled, dim=-1) if pooling.normalize else pooled


def long_output(source: Source, batch: Arrays) -> torch.Tensor:
    """The output for rows without labels."""
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    if source.pooling is not None:
        return _embedding(source.pooling, source.model, inputs)
    logits: torch.Tensor = source.model(**inputs).logits
    return logits


def with_adapter(model: Any, path: Path) -> Any:
    """PEFT's model of an adapter, which trains. PEFT trains no prompt that it has read: here it does."""
    prompts = peft.PeftConfig.from_pretrained(str(path)).is_prompt_learning
    wrapped = peft.PeftModel.from_pretrained(model, str(path), is_trainable=not prompts).eval()
    if prompts:
        for name, parameter in wrapped.named_parameters():
            trains = name.startswith("prompt_encoder.default.") or ".modules_to_save.default." in name
            parameter.requires_grad_(trains)
    return wrapped


def without_adapter(model: Any) -> Any:
    """The base of `with_adapter`'s model."""
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()


def parameters_by_key(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters by PEFT's state-dict key, as its file has them."""
    keys = {name: _WRAPPED.sub("", name) for name, _ in model.named_parameters()}
    return {
        KEY if keys[name] == _PROMPT else keys[name]: parameter
        for name, parameter in model.named_parameters()
    }


def torch_gradients(model: Any, adapter: Adapter) -> dict[str, np.ndarray]:
    """Gradients by the key that `Adapter.tensors` has for them."""
    found = {
        key: parameter.grad.numpy()
        for key, parameter in parameters_by_key(model).items()
        if parameter.grad is not None
    }
    return adapter.technique.from_file(adapter.config, found, adapter.origin)
