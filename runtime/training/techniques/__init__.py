"""Techniques that do more in a step than follow the gradient, by name; of any other nothing stands here.

A module of this package is named like its technique and has its `STEPS`.
"""

import importlib
import pkgutil
from collections.abc import Iterable

from edgepeft.adapters import Adapter

from .base import Steps

MODULES = {
    item.name: f"{__name__}.{item.name}" for item in pkgutil.iter_modules(__path__) if item.name != "base"
}
"""Of every such technique, by its name, the module that has it."""


def steps_of(technique: str) -> type[Steps]:
    """What the technique of a name does in steps."""
    if technique not in MODULES:
        return Steps
    found: type[Steps] = importlib.import_module(MODULES[technique]).STEPS
    return found


def steps_that_train(adapter: Adapter, names: Iterable[str]) -> type[Steps]:
    """What the adapter's technique does in steps that train these tensors of it."""
    return steps_of(adapter.technique.name) if any(map(adapter.technique.owns, names)) else Steps
