"""The tiny models of `tiny.py` in torch, whose autograd and optimizers are the reference."""

from collections.abc import Mapping
from typing import Any

import torch

from edgepeft.adapters import Adapter

from . import tiny


class TorchTiny:
    """The shared encoder with an adapter's tensors as parameters, in PEFT's layout."""

    def __init__(self, adapter: Adapter) -> None:
        self.frozen = {name: torch.from_numpy(value) for name, value in tiny.weights().items()}
        self.parameters = {
            key: torch.from_numpy(value.copy()).requires_grad_() for key, value in adapter.tensors.items()
        }
        self.scaling = adapter.scaling(tiny.MODULE)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        lora = x @ self.parameters[tiny.A].T @ self.parameters[tiny.B].T
        return torch.tanh(x @ self.frozen["dense"] + self.scaling * lora)

    def embed(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return self.frozen["embedding"][torch.as_tensor(batch["input_ids"])]

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        raise NotImplementedError


class TorchClassifier(TorchTiny):
    """Mean pooling and a saved head."""

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        mask = torch.as_tensor(batch["attention_mask"]).unsqueeze(-1).float()
        h = self.dense((self.embed(batch) * mask).sum(1) / mask.sum(1))
        logits = h @ self.parameters[tiny.HEAD].T + self.parameters[tiny.BIAS]
        return torch.nn.functional.cross_entropy(logits, torch.as_tensor(batch["labels"]))


class TorchLanguageModel(TorchTiny):
    """Running means and the next token."""

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        embedded = self.embed(batch)
        counts = torch.arange(1, embedded.shape[1] + 1).reshape(1, -1, 1)
        logits = self.dense(embedded.cumsum(1) / counts) @ self.frozen["unembedding"]
        targets = torch.as_tensor(batch["labels"])[:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, tiny.VOCAB), targets)
