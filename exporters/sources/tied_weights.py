"""Parameters that modules share, and by which name each goes.

PEFT names what it changes by modules, and torch.export names a shared parameter by any of those that have it.
A product is where both the output layer's LoRA and its saved copy belong, so a linear's name comes first.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from .base import Lookup


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """By every name of every parameter, the one that it goes by: a linear's, else its first."""
    linears = tuple(
        f"{name}." for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)
    )
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found: dict[str, str] = {}
    for same in names.values():
        chosen = next((name for name in same if f"{name.rpartition('.')[0]}." in linears), same[0])
        found |= dict.fromkeys(same, chosen)
    return found


def untie(model: Any, modules: Iterable[str]) -> None:
    """Give each of `modules` parameters of its own where modules outside it share them.

    PEFT copies a module that it saves whole: a tied output layer that is trained leaves the embedding as it
    was.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for module in modules:
        inside = {name: part for name, part in parameters.items() if name.startswith(f"{module}.")}
        outside = {part for name, part in parameters.items() if name not in inside}
        copies: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for name, part in inside.items():
            if part not in outside:
                continue
            own = copies.setdefault(part, torch.nn.Parameter(part.detach().clone(), requires_grad=False))
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, own)
            parameters[name] = own


def find_lookups(model: torch.nn.Module) -> dict[str, Lookup]:
    """Every embedding module by its name."""
    names = canonical_names(model)
    modules = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
    }
    tables = {name: names[f"{name}.weight"] for name in modules}
    count = Counter(tables.values())
    return {
        name: Lookup(tables[name], module.padding_idx, alone=count[tables[name]] == 1)
        for name, module in modules.items()
    }


def vocabulary_tables(model: Any) -> list[torch.nn.Parameter]:
    """The weights with a row for every token: the embedding's and the output layer's, where there are any."""
    try:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # a model of recordings
        return []
    weights = [getattr(layer, "weight", None) for layer in layers]
    return [weight for weight in weights if isinstance(weight, torch.nn.Parameter) and weight.ndim == 2]
