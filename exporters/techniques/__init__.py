"""Techniques by name: where in a graph their slots go, and what computes them.

A technique is a module of this package with its `TECHNIQUE`, and one of `edgepeft.techniques`, which says
what an adapter's tensors mean in its slots.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from edgepeft.slots import LORA, WHOLE, Slot

from .base import BaseGraph, GraphTechnique

ORDER = (WHOLE, LORA)
"""The order in which slots are put in: what adapters replace comes first, being no frozen weight then."""


def graph_technique(name: str) -> GraphTechnique[Any]:
    """The graph half of the technique of a name that is one of `edgepeft.techniques.NAMES`."""
    found = importlib.import_module(f".{name}", __name__).TECHNIQUE
    assert isinstance(found, GraphTechnique)
    return found


def insert_slots(base: BaseGraph, sites: Mapping[str, list[Any]]) -> dict[str, list[Slot]]:
    """Put slots in, at sites by technique; the caller sorts the graph afterwards.

    Raises:
        ExportError: the graph says too little of a site.
    """
    return {name: graph_technique(name).insert(base, sites.get(name, [])) for name in ORDER}
