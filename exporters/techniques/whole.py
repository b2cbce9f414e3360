"""Parameters that an adapter replaces whole (PEFT's `modules_to_save`, biases): they stay graph inputs."""

from collections.abc import Mapping, Sequence

from edgepeft.slots import PARAMETER, PREFIX, WHOLE, Slot
from edgepeft.techniques import whole
from edgepeft.techniques.base import Settings

from ..graph import transposed_input
from .base import BaseGraph, GraphTechnique


class Whole(GraphTechnique[str]):
    """Its sites are names of weights."""

    name, site = WHOLE, PARAMETER

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[str]:
        """Those parameters that the graph reads of the modules; a name may be a single parameter's, too."""
        prefixes = tuple(f"{module}." for module in modules)
        return [
            name
            for name, value in base.weights.items()
            if (name in modules or name.startswith(prefixes)) and value.uses()
        ]

    def insert(self, base: BaseGraph, sites: Sequence[str]) -> list[Slot]:
        """Rename the inputs to PEFT's keys; one that the trace has transposed becomes as PyTorch has it."""
        slots = []
        for name in sites:
            value = base.weights.pop(name)
            if name in base.turned:
                base.graph.inputs.remove(value)
                value = transposed_input(base.graph, value)
                base.graph.inputs.append(value)
            assert value.shape is not None
            module, parameter = name.rsplit(".", 1)
            value.name = f"{PREFIX}{name}"
            slots.append(whole.new_slot(module, parameter, value.shape.numpy(), name))
        return slots


GRAPH_TECHNIQUE = Whole()
