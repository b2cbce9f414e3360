"""Techniques by name: where in a graph their slots go, and what computes them.

A technique is a module of this package with its `GRAPH_TECHNIQUE`, and one of that name in
`edgepeft.techniques`, which says what an adapter's tensors mean in its slots.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from edgepeft import techniques
from edgepeft.slots import WHOLE, Slot
from edgepeft.techniques.base import Settings

from .base import BaseGraph, GraphTechnique

MODULES = {name: f"{__name__}.{name}" for name in techniques.MODULES}
"""Of every technique, by its name, the module that has its graph half."""


def graph_technique(name: str) -> GraphTechnique[Any]:
    """The graph half of the technique of a name that is in `MODULES`."""
    found = importlib.import_module(MODULES[name]).GRAPH_TECHNIQUE
    assert isinstance(found, GraphTechnique)
    return found


def plain_slots(modules: Iterable[str]) -> dict[str, Settings]:
    """Modules for slots of techniques that have no settings."""
    return {module: {} for module in modules}


def find_sites(base: BaseGraph, modules: Mapping[str, Mapping[str, Settings]]) -> dict[str, list[Any]]:
    """The places in the graph for slots on modules, which have settings, by technique.

    Raises:
        ExportError: a module is none that its technique can be applied to.
    """
    return {name: graph_technique(name).sites(base, wanted) for name, wanted in modules.items()}


def insert_slots(base: BaseGraph, sites: Mapping[str, list[Any]]) -> list[Slot]:
    """Put slots in, at sites by technique; the caller sorts the graph afterwards.

    What adapters replace whole comes first, being no frozen weight then, and stands last.

    Raises:
        ExportError: the graph says too little of a site.
    """
    replaced = graph_technique(WHOLE).insert(base, sites.get(WHOLE, []))
    others = sorted(sites.keys() - {WHOLE})
    return [*(slot for name in others for slot in graph_technique(name).insert(base, sites[name])), *replaced]
