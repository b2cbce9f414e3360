"""How much of what a model says is lost with each of its weights, from one backward pass.

A rounded weight changes what its linear makes by δ = (Q - W) x. To second order the model's output moves by

    KL ≈ ½ · mean over tokens of Σ_i g_i² δ_i²

where g is the gradient of -log p of a label that is drawn from the model's own prediction (the empirical
Fisher information, its diagonal at what a linear makes). Of a model that gives something else than logits of
tokens, g is that of a random direction of its output: the sum is its mean squared change.

Source: Fisher-weighted rounding as in Kim et al., "SqueezeLLM", arXiv 2306.07629, at outputs instead of
weights; measured in docs/decisions.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..quantize.layouts import QuantizedWeight
from .groups import Feeds
from .passes import fast_products, requiring_gradients

#: Rounds a weight `[out_features, in_features]`, given the mean square of what each of its columns is
#: multiplied with (None: alike).
Rounding = Callable[[torch.Tensor, torch.Tensor | None], QuantizedWeight]


@dataclass
class _Losses:
    """Adds up what each weight loses; hooks of one run."""

    rounded: Rounding
    found: dict[str, float] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)

    def of_linear(self, name: str, weight: torch.Tensor) -> Callable[..., None]:
        """A forward hook of a linear with that weight."""

        def hook(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, weight.shape[1])

            def add(gradient: torch.Tensor) -> None:
                rows = x.float()
                if name not in self.quantized:
                    self.quantized[name] = self.rounded(weight, rows.square().mean(0))
                change = rows @ self.quantized[name].dequantize().sub_(weight).T
                change *= gradient.reshape(change.shape)
                self.found[name] = self.found.get(name, 0.0) + 0.5 * float(change.square_().sum())

            output.register_hook(add)

        return hook

    def of_table(self, name: str, weight: torch.Tensor) -> Callable[..., None]:
        """A forward hook of an embedding with that weight."""

        def hook(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            ids = args[0].reshape(-1)

            def add(gradient: torch.Tensor) -> None:
                rows, places = ids.unique(return_inverse=True)
                exact = weight[rows]
                change = self.rounded(exact, None).dequantize().sub_(exact)[places]
                change *= gradient.reshape(change.shape)
                self.found[name] = self.found.get(name, 0.0) + 0.5 * float(change.square_().sum())

            output.register_hook(add)

        return hook


def sensitivities(
    model: Any, feeds: Sequence[Feeds], names: Collection[str], rounded: Rounding, seed: int
) -> dict[str, float]:
    """What is lost with each of the weights, a token.

    Args:
        model: in evaluation mode; nothing of it is changed.
        feeds: its keyword arguments, one or several records each; a few hundred tokens are enough.
        names: of linears and embeddings. What is reached by two names (a tied embedding) has the sum of both
            at the first.
        rounded: see `Rounding`.
        seed: draws labels and directions.

    Returns:
        By name, in the units of the output; what the feeds do not reach is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    losses, firsts = _Losses(rounded), dict[int, str]()
    tokens = 0
    with ExitStack() as stack:
        stack.enter_context(requiring_gradients(model, False))  # only what layers make is asked for
        stack.enter_context(torch.enable_grad())
        for module in model.modules():  # where gradients begin
            if isinstance(module, torch.nn.Embedding | torch.nn.Conv1d | torch.nn.Conv2d):
                handle = module.register_forward_hook(lambda *call: call[-1].requires_grad_())
                stack.callback(handle.remove)
        for name in names:
            module = model.get_submodule(name)
            table = isinstance(module, torch.nn.Embedding)
            first = firsts.setdefault(id(module.weight), name)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            hook = (losses.of_table if table else losses.of_linear)(first, weight.detach())
            stack.callback(module.register_forward_hook(hook).remove)
        for each in feeds:
            with fast_products():
                output = model(**each)[0]
            tokens += output.shape[:-1].numel()
            _surprise(model, output.float(), generator).backward()
    return {name: loss / tokens for name, loss in losses.found.items()}


def _surprise(model: Any, output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose gradient has the Fisher information as its mean square; see above."""
    head = model.get_output_embeddings()
    if head is None or output.shape[-1] != len(head.weight):
        return (output * torch.randn(output.shape, generator=generator)).sum()
    logits = output.reshape(-1, output.shape[-1])
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
