"""Where a forward graph can be cut: the values through which everything that depends on the data passes.

A value is *hidden* where it depends on the data of a model input and on a parameter. A node whose hidden
output every path to the result passes (a dominator of the result, in the graph of hidden values) is a cut;
between two cuts lies a segment. What depends on the inputs alone (masks, rotary angles, sizes) is the
*context* that all segments share; what depends on parameters alone belongs to every segment that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from ..graph import in_front, is_behind, is_shared

#: Operators that see the shape of their input and not its data.
_SHAPE_ONLY = {"Shape", "Size", "ConstantOfShape"}


@dataclass(frozen=True)
class Segment:
    """Nodes between two cuts, in the graph's order.

    `hidden` is the value of the cut before, None for the first segment; `output` that of the cut behind.
    """

    nodes: tuple[ir.Node, ...]
    hidden: ir.Value | None
    output: ir.Value


@dataclass(frozen=True)
class Dependence:
    """What a value depends on."""

    inputs: bool = False  # on a model input, at least on its shape
    data: bool = False  # on the data of a model input
    parameters: bool = False  # on a weight or an adapter tensor
    adapter: bool = False  # on an adapter tensor

    def __or__(self, other: Dependence) -> Dependence:
        return Dependence(
            self.inputs or other.inputs,
            self.data or other.data,
            self.parameters or other.parameters,
            self.adapter or other.adapter,
        )

    @property
    def hidden(self) -> bool:
        """Whether the value is part of the chain."""
        return self.data and self.parameters

    @property
    def local(self) -> bool:
        """Whether a value that is not hidden is computed by every segment that reads it."""
        return not self.inputs or self.adapter


def dependences(
    graph: ir.Graph,
    weights: Collection[str],
    adapter_inputs: Collection[str],
    shared_inputs: Collection[str] = (),
) -> dict[ir.Value, Dependence]:
    """What each value of `graph` depends on.

    Args:
        weights: names of the initializers that are parameters.
        adapter_inputs: names of the graph inputs that are adapter tensors.
        shared_inputs: names of model inputs whose data belongs to the context, whatever table is looked up
            with it.
    """
    found: dict[ir.Value, Dependence] = {}
    for value in graph.inputs:
        of_adapter, shared = value.name in adapter_inputs, value.name in shared_inputs
        found[value] = Dependence(
            inputs=not of_adapter,
            data=not of_adapter and not shared,
            parameters=of_adapter,
            adapter=of_adapter,
        )
    for name, value in graph.initializers.items():
        found[value] = Dependence(parameters=name in weights)
    for node in graph:
        total = Dependence()
        for operand in node.inputs:
            if operand is not None:
                total |= found.get(operand, Dependence())
        if (node.op_type in _SHAPE_ONLY and not node.domain) or is_shared(node):
            total = Dependence(inputs=total.inputs)
        for output in node.outputs:
            found[output] = total
    return found


def cut(graph: ir.Graph, output: ir.Value, depends: dict[ir.Value, Dependence]) -> list[Segment]:
    """The finest chain of segments whose last one makes `output`.

    Together they are all that `output` needs but the context.
    """
    cuts = [*_dominators(graph, output, depends), output]
    own = ancestors([output], through=in_front)
    cuts = [value for value in cuts if value is output or _is_models_own(value, own)]
    segments: list[Segment] = []
    taken: set[ir.Node] = set()
    hidden: ir.Value | None = None
    for value in cuts:
        own = ancestors([value], partial(_belongs, hidden, depends))
        shared = {node for node in own if not depends[node.outputs[0]].hidden}
        nodes = tuple(node for node in graph if node in own and (node in shared or node not in taken))
        taken |= own - shared
        segments.append(Segment(nodes, hidden, value))
        hidden = value
    return segments


def _is_models_own(value: ir.Value, own: Collection[ir.Node]) -> bool:
    """Whether the model has this value also without what techniques have put into it: no value inside of a
    slot, and what stands last at its place, so that slots leave the chain's cuts where they are."""
    last = not any(position == 0 and is_behind(reader) for reader, position in value.uses())
    return last and in_front(value).producer() in own


def _belongs(hidden: ir.Value | None, depends: dict[ir.Value, Dependence], value: ir.Value) -> bool:
    """Whether a segment that begins at the cut `hidden` makes `value` itself: the context does not."""
    dependence = depends.get(value)
    return value is not hidden and dependence is not None and (dependence.hidden or dependence.local)


def _dominators(graph: ir.Graph, output: ir.Value, depends: dict[ir.Value, Dependence]) -> Iterable[ir.Value]:
    """Hidden values that every hidden path to `output` passes, first to last, without `output` itself."""
    # Immediate dominators in topological order (Cooper, Harvey and Kennedy, 2001); None is the virtual root.
    parent: dict[ir.Node, ir.Node | None] = {}
    depth: dict[ir.Node | None, int] = {None: 0}
    for node in graph:
        if not depends[node.outputs[0]].hidden:
            continue
        producers = [
            value.producer()
            for value in node.inputs
            if value is not None and depends.get(value) is not None and depends[value].hidden
        ]
        common: ir.Node | None = None
        if producers and all(producer is not None for producer in producers):
            common = producers[0]
            for other in producers[1:]:
                a, b = common, other
                while a is not b:
                    if depth[a] >= depth[b]:
                        assert a is not None
                        a = parent[a]
                    else:
                        assert b is not None
                        b = parent[b]
                common = a
        parent[node] = common
        depth[node] = depth[common] + 1
    chain: list[ir.Value] = []
    last = output.producer()
    assert last is not None
    above = parent[last]
    while above is not None:
        used = [value for value in above.outputs if value.uses()]
        if len(used) == 1 and used[0].dtype is not None and used[0].dtype.is_floating_point():
            chain.append(used[0])
        above = parent[above]
    return reversed(chain)


def ancestors(
    values: Iterable[ir.Value],
    follows: Callable[[ir.Value], bool] = lambda _: True,
    through: Callable[[ir.Value], ir.Value] = lambda value: value,
) -> set[ir.Node]:
    """Nodes that `values` need, back to where `follows` says no; `through` says what stands for a value."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = through(waiting.pop())
        node = value.producer()
        if node is not None and node not in found and follows(value):
            found.add(node)
            waiting.extend(operand for operand in node.inputs if operand is not None)
    return found
