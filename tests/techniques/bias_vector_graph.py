"""The graph half of `bias_vector`: what real techniques have in `exporters/techniques/`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from edgepeft.exporters import techniques as graph_techniques
from edgepeft.exporters.graph import put_behind
from edgepeft.exporters.passes.weights.linears import Linear, select
from edgepeft.exporters.techniques.base import BaseGraph, GraphTechnique, slot_inputs
from edgepeft.slots import LINEAR, Slot
from edgepeft.techniques.base import Settings

from . import bias_vector
from .bias_vector import NAME, new_slot


class BiasVectorGraph(GraphTechnique[Linear]):
    """What computes it."""

    name, site = NAME, LINEAR

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Linear]:
        return list(select(base.linears, modules).values())

    def insert(self, base: BaseGraph, sites: Sequence[Linear]) -> list[Slot]:
        slots = []
        for linear in sites:
            slot = new_slot(linear.module, linear.out_features)
            (shift,) = slot_inputs(base.graph, slot)
            for node, _ in linear.uses:
                put_behind(base.graph, node.outputs[0], "Add", shift)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = BiasVectorGraph()


@contextmanager
def added() -> Iterator[None]:
    """Have edgepeft know both halves, as it knows what is in its own packages."""
    with bias_vector.added(), patch.dict(graph_techniques.MODULES, {NAME: __name__}):
        yield
