"""What a technique does to a graph: where it may be applied, and the operators that apply it."""

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import onnx_ir as ir

from edgepeft.slots import SIZE, SIZE_AXIS, Slot
from edgepeft.techniques.base import Settings

from ..graph import graph_input
from ..options import ExportOptions
from ..passes.weights.linears import Linear, select
from ..sources.base import ModelSource
from ..sources.model_info import default_targets

Site = TypeVar("Site")


@dataclass(frozen=True)
class BaseGraph:
    """The base's optimized graph, before its weights are frozen.

    Attributes:
        graph: the graph, its weights inputs.
        weights: those inputs by name; one that adapters replace is taken out.
        linears: the linear modules by name.
        turned: weights that the trace has transposed.
    """

    graph: ir.Graph
    weights: dict[str, ir.Value]
    linears: dict[str, Linear] = field(default_factory=dict)
    turned: Collection[str] = ()


class GraphTechnique(abc.ABC, Generic[Site]):
    """The graph half of a technique; the other is in `edgepeft.techniques`."""

    name: ClassVar[str]
    site: ClassVar[str]
    """What a slot is on; see `edgepeft.slots.Slot`."""

    @abc.abstractmethod
    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Site]:
        """The places in the graph for slots on these modules, which have these settings.

        Raises:
            ExportError: a module is none that the technique can be applied to.
        """

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """Modules for slots that no adapter at hand asks for, with their settings.

        Raises:
            ExportError: a target of the options is none of the model's, or none are given and PEFT has none.
        """
        targets = default_targets(source) if options.targets is None else options.targets
        return {name: {} for name in select(source.linear_sizes(), targets)}

    @abc.abstractmethod
    def insert(self, base: BaseGraph, sites: Sequence[Site]) -> list[Slot]:
        """Put a slot in at each of some `sites` of the graph, once; the caller sorts the graph afterwards.

        Raises:
            ExportError: the graph says too little of a place.
        """


def activation_axes(linear: Linear) -> int:
    """Axes of what the linear is given, the first being the batch; 0 where it is not in every use."""
    shapes = {tuple(map(str, node.outputs[0].shape or ())) for node, _ in linear.uses}
    return len(shape) if len(shapes) == 1 and (shape := shapes.pop())[:1] == ("batch",) else 0


def slot_inputs(graph: ir.Graph, slot: Slot) -> list[ir.Value]:
    """A slot's tensors as inputs of the graph; what an adapter chooses the size of is an axis of its own."""
    axes = {str(dim) for value in graph.inputs for dim in value.shape or ()}
    own = f"{SIZE_AXIS}{sum(axis.startswith(SIZE_AXIS) for axis in axes)}"
    return [
        graph_input(graph, tensor.input, [own if dim == SIZE else dim for dim in tensor.shape])
        for tensor in slot.tensors
    ]
