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


def steps_of(adapter: Adapter, names: Iterable[str]) -> type[Steps]:
    """What the adapter's technique does in steps that train these tensors of it."""
    technique = adapter.technique
    if technique.name not in MODULES or not any(map(technique.owns, names)):
        return Steps
    found: type[Steps] = importlib.import_module(MODULES[technique.name]).STEPS
    return found
