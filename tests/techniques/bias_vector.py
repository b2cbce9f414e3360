"""A technique that tests add: a vector that is added to what a linear module makes, `y += shift`.

All of it is here, both halves: what real ones have in `edgepeft/techniques/` and `exporters/techniques/`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from edgepeft import techniques
from edgepeft.exporters import techniques as graph_techniques
from edgepeft.exporters.graph import put_behind
from edgepeft.exporters.passes.weights.linears import Linear, select
from edgepeft.exporters.techniques.base import BaseGraph, GraphTechnique, slot_inputs
from edgepeft.slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from edgepeft.techniques.base import Held, PeftTechnique, difference

NAME, SHIFT = "bias_vector", ".shift"


def new_slot(module: str, out_features: int) -> Slot:
    """A slot on a linear module."""
    key = f"{PREFIX}{module}{SHIFT}"
    tensor = SlotTensor("shift", key, key, (out_features,), transposed=False, trains=True, neutral=ZEROS)
    return Slot(NAME, LINEAR, module, (tensor,))


class BiasVector(PeftTechnique):
    """What an adapter's tensors mean."""

    name, title, peft_type = NAME, "bias vector", "BIAS_VECTOR"
    inert = "every shift is zero"
    suffixes = (SHIFT,)

    def problem(self, slot: Slot) -> str | None:
        (size,) = slot.tensors[0].shape if len(slot.tensors) == 1 else ("?",)
        return difference(slot, new_slot(slot.module, size)) if isinstance(size, int) else "has no one vector"

    def has_effect(self, adapter: Held) -> bool:
        return any(bool(value.any()) for key, value in adapter.tensors.items() if self.owns(key))


class BiasVectorGraph(GraphTechnique[Linear]):
    """What computes it."""

    name, site = NAME, LINEAR

    def sites(self, base: BaseGraph, modules: Sequence[str]) -> list[Linear]:
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


TECHNIQUE, GRAPH_TECHNIQUE = BiasVector(), BiasVectorGraph()


@contextmanager
def added() -> Iterator[None]:
    """Have edgepeft know it, as it knows what is in its own packages."""
    with (
        patch.dict(techniques.MODULES, {NAME: __name__}),
        patch.dict(graph_techniques.MODULES, {NAME: __name__}),
    ):
        yield
