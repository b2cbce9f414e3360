"""What a technique does to a graph: where it may be applied, and the operators that apply it."""

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
import onnx_ir as ir
import torch

from edgepeft.errors import ExportError
from edgepeft.slots import LINEAR, SIZE, SIZE_AXIS, Slot
from edgepeft.techniques import technique
from edgepeft.techniques.base import Settings

from ..graph import append, graph_input, initializer, put_behind
from ..options import ExportOptions
from ..passes.weights.linears import Linear, select
from ..sources.base import Lookup, ModelSource
from ..sources.model_info import default_targets

#: Of a method's slots, where no adapter at hand and no option says.
DEFAULT_RANK = 8
Site = TypeVar("Site")


@dataclass(frozen=True)
class BaseGraph:
    """The base's optimized graph, before its weights are frozen.

    Attributes:
        graph: the graph, its weights inputs.
        weights: those inputs by name; one that adapters replace is taken out.
        tensors: the values of the weights, by name.
        linears: the linear modules by name.
        turned: weights that the trace has transposed.
        lookups: embeddings, where PyTorch says more of them than the graph.
    """

    graph: ir.Graph
    weights: dict[str, ir.Value]
    tensors: Mapping[str, torch.Tensor]
    linears: dict[str, Linear] = field(default_factory=dict)
    turned: Collection[str] = ()
    lookups: Mapping[str, Lookup] = field(default_factory=dict)


class GraphTechnique(abc.ABC, Generic[Site]):
    """The graph half of a technique; the other is in `edgepeft.techniques`."""

    name: ClassVar[str]
    site: ClassVar[str]
    """What a slot is on; see `edgepeft.slots.Slot`."""

    def check(self, source: ModelSource, options: ExportOptions) -> None:
        """Look whether the technique is for such a model, before it is traced.

        Raises:
            UsageError: it is not, or not with these options.
        """

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


class Computed(Protocol):
    """What nodes of a graph compute, as a `Linear`."""

    @property
    def nodes(self) -> tuple[ir.Node, ...]: ...


def activation_axes(module: Computed) -> int:
    """Axes of what the module makes, the first being the batch; 0 where it is not in every use."""
    shapes = {tuple(map(str, node.outputs[0].shape or ())) for node in module.nodes}
    return len(shape) if len(shapes) == 1 and (shape := shapes.pop())[:1] == ("batch",) else 0


class OnLinear(GraphTechnique[tuple[Linear, Settings]]):
    """A technique that adds something of what linear modules read, `delta(x)`."""

    site = LINEAR

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names."""
        return [(linear, modules[name]) for name, linear in select(base.linears, modules).items()]

    @abc.abstractmethod
    def slot(self, linear: Linear, settings: Settings) -> Slot:
        """A slot on the linear."""

    @abc.abstractmethod
    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        """What is added; `inputs` are the slot's by what the technique calls them."""

    @abc.abstractmethod
    def add(self, graph: ir.Graph, linear: Linear, node: ir.Node, x: ir.Value, delta: ir.Value) -> None:
        """Add it, at a node that computes the linear of `x`."""

    def insert(self, base: BaseGraph, sites: Sequence[tuple[Linear, Settings]]) -> list[Slot]:
        slots = []
        for linear, settings in sites:
            slot = self.slot(linear, settings)
            inputs = dict(
                zip((tensor.name for tensor in slot.tensors), slot_inputs(base.graph, slot), strict=True)
            )
            for node, x in linear.uses:
                if node.outputs[0].shape is None or x.shape is None:
                    raise ExportError(
                        f"linear {linear.module}: the shape of its output is unknown, so it takes no "
                        f"{technique(self.name).title}"
                    )
                self.add(base.graph, linear, node, x, self.delta(base.graph, slot, inputs, x))
            slots.append(slot)
        return slots


class BesideLinear(OnLinear):
    """A technique that adds to what linear modules make: `y += delta(x)`, `[…, out_features]`."""

    def add(self, graph: ir.Graph, linear: Linear, node: ir.Node, x: ir.Value, delta: ir.Value) -> None:
        del x
        output = node.outputs[0]
        put_behind(graph, output, "Add", in_columns(graph, delta, linear.first, output))


class InFrontOfLinear(OnLinear):
    """A technique that adds to what linear modules read: `x += delta(x)`, `[…, in_features]`."""

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names.

        Raises:
            ExportError: one reads its input in the same product as others.
        """
        found = super().sites(base, modules)
        for linear, _ in found:
            if shares_product(linear):
                raise ExportError(
                    f"linear {linear.module} reads what others read in the same product, so "
                    f"{technique(self.name).title} cannot change it there: leave it out of the targets"
                )
        return found

    def add(self, graph: ir.Graph, linear: Linear, node: ir.Node, x: ir.Value, delta: ir.Value) -> None:
        del linear
        put_behind(graph, x, "Add", delta, only=[node])


def shares_product(linear: Linear) -> bool:
    """Whether its product is wider than itself, since others are computed in it."""
    shapes = [node.outputs[0].shape for node in linear.nodes]
    return any(shape is None or shape[-1] != linear.out_features for shape in shapes)


def slot_rank(options: ExportOptions) -> int:
    """The rank of slots that have it fixed and that no adapter at hand asks for."""
    return DEFAULT_RANK if options.rank is None else options.rank


def low_rank(
    graph: ir.Graph,
    x: ir.Value,
    a: ir.Value,
    factors: Sequence[ir.Value],
    b: ir.Value,
    lead: Sequence[int | ir.SymbolicDim],
) -> ir.Value:
    """`((x A) * factors…) B` `[*lead, out_features]`: A `[in_features, rank]`, each factor of the rank, B
    `[rank, out_features]`."""
    assert a.shape is not None
    assert b.shape is not None
    shape = [*lead, a.shape[1]]
    low = append(graph, "MatMul", [x, a], shape=shape)
    for factor in factors:
        low = append(graph, "Mul", [low, factor], shape=shape)
    return append(graph, "MatMul", [low, b], shape=[*lead, b.shape[1]])


def known_output(node: ir.Node, what: str) -> tuple[ir.Value, list[int | ir.SymbolicDim]]:
    """What the node makes of a module, and its axes.

    Raises:
        ExportError: its shape is unknown, so that nothing can be put behind it.
    """
    output = node.outputs[0]
    if output.shape is None:
        raise ExportError(f"{what}: the shape of its output is unknown, so it takes no LoRA")
    return output, list(output.shape)


def turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A matrix transposed."""
    assert value.shape is not None
    return append(graph, "Transpose", [value], {"perm": [1, 0]}, shape=list(value.shape)[::-1])


def reshaped(
    graph: ir.Graph, value: ir.Value, target: Sequence[int], shape: Sequence[int | ir.SymbolicDim]
) -> ir.Value:
    """A value in another `shape`, which is told in `target`: 0 is an axis that stays, -1 what is left."""
    name = "shape_" + "_".join(map(str, target))
    return append(
        graph, "Reshape", [value, initializer(graph, name, np.array(target, np.int64))], shape=shape
    )


def in_columns(graph: ir.Graph, value: ir.Value, first: int, output: ir.Value, fill: float = 0) -> ir.Value:
    """`value` in the columns from `first` on of what is as wide as `output`, `fill` in the others."""
    assert output.shape is not None
    assert value.shape is not None
    width, own = output.shape[-1], value.shape[-1]
    if width == own or not isinstance(width, int) or not isinstance(own, int):
        return value
    pads = initializer(graph, f"columns_{first}_{own}", np.array([first, width - first - own], np.int64))
    filled = initializer(graph, "one_float32" if fill else "zero_float32", np.array(fill, np.float32))
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    return append(graph, "Pad", [value, pads, filled, last], shape=[*list(value.shape)[:-1], width])


def size_axis(graph: ir.Graph) -> str:
    """A name for an axis that an adapter chooses the size of, which the graph does not have yet."""
    axes = {str(dim) for value in graph.inputs for dim in value.shape or ()}
    return f"{SIZE_AXIS}{sum(axis.startswith(SIZE_AXIS) for axis in axes)}"


def slot_inputs(graph: ir.Graph, slot: Slot) -> list[ir.Value]:
    """A slot's tensors as inputs of the graph; what an adapter chooses the size of is an axis of its own."""
    own = size_axis(graph)
    return [
        graph_input(graph, tensor.input, [own if dim == SIZE else dim for dim in tensor.shape])
        for tensor in slot.tensors
    ]
