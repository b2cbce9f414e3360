"""A forward graph cut into pieces, each of which becomes a stage, and what they share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..forward import Forward
from ..graph import tidy
from ..passes.input_shapes import take_sizes_from_inputs
from ..writer import is_weight
from .cuts import Segment, ancestors, cut, dependences
from .output_slice import OutputLayer, find_output_layer
from .signature import Signature, describe, find_period


@dataclass(frozen=True)
class Pieces:
    """Pieces of a graph from its inputs to one of its outputs.

    Attributes:
        graph: a copy of the forward graph.
        weight_names: names of its initializers that are weights.
        pieces: the pieces, each the segments that make one stage.
        signatures: of the pieces; equal ones compute the same.
        names: what stages take from the context, by the names they get there.
        layer: the output layer where it is left out of the pieces.
    """

    graph: ir.Graph
    weight_names: set[str]
    pieces: list[list[Segment]]
    signatures: list[Signature]
    names: dict[ir.Value, str]
    layer: OutputLayer | None


def cut_into_pieces(forward: Forward, output: str | None, *, slice_output: bool) -> Pieces | None:
    """Cut a copy of a forward graph, its weights frozen.

    Args:
        forward: the graph.
        output: the output to cut for; its first one where None.
        slice_output: leave an output layer that can run by slices of its rows out of the pieces.

    Returns:
        The pieces, or None where there is one piece only, or a size that only a hidden state has.
    """
    model = forward.model.clone()
    graph = model.graph
    take_sizes_from_inputs(graph)
    tidy(model)
    weight_names = {
        name
        for name, value in graph.initializers.items()
        if value.const_value is not None and is_weight(name, value.const_value)
    }
    adapter_names = {
        *(key for slot in forward.slots for key in (slot.a_input, slot.b_input, slot.scaling_input)),
        *(module.input for module in forward.saved_modules),
    }
    last = next(value for value in graph.outputs if output in (None, value.name))
    depends = dependences(graph, weight_names, adapter_names)
    pieces = group(cut(graph, last, depends), weight_names, adapter_names)
    layer = find_output_layer(pieces[-1], weight_names) if slice_output else None
    if layer is not None:
        # What comes before the output layer, a normalization, is a stage of its own.
        pieces[-1:] = [] if layer.x is pieces[-1][0].hidden else [_ending_with(pieces[-1], layer.x)]
    signatures = [describe(piece, weight_names, adapter_names) for piece in pieces]
    names = _name_context(signatures)
    if len(pieces) < 2 or any(depends[value].hidden for node in ancestors(names) for value in node.outputs):
        return None
    return Pieces(graph, weight_names, pieces, signatures, names, layer)


def _ending_with(piece: Sequence[Segment], output: ir.Value) -> list[Segment]:
    """A piece up to one of its values, as one segment."""
    hidden = piece[0].hidden
    own = {node for segment in piece for node in segment.nodes}
    needed = ancestors([output], lambda value: value is not hidden and value.producer() in own)
    nodes = tuple(node for segment in piece for node in segment.nodes if node in needed)
    return [Segment(nodes, hidden, output)]


def group(
    segments: Sequence[Segment], weight_names: Collection[str], adapter_names: Collection[str]
) -> list[list[Segment]]:
    """Segments as pieces: each repetition of a repeated run is one, what lies between such runs is one.

    A run counts where its unit trains something; the last piece is what follows the last run.
    """
    signatures = [describe([segment], weight_names, adapter_names) for segment in segments]

    def pieces_of(start: int, end: int) -> list[list[Segment]]:
        trains = any(signature.adapter for signature in signatures[start:end])
        first, length, count = find_period([s.text for s in signatures[start:end]]) if trains else (0, 0, 0)
        first += start
        behind = first + length * count
        if count == 0 or not any(s.adapter for s in signatures[first : first + length]):
            return [list(segments[start:end])] if start < end else []
        runs = [list(segments[first + i * length : first + (i + 1) * length]) for i in range(count)]
        return [*pieces_of(start, first), *runs, *pieces_of(behind, end)]

    return pieces_of(0, len(segments))


def name_of(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _name_context(signatures: Sequence[Signature]) -> dict[ir.Value, str]:
    """The values that stages take from the context, by the names they get there: model inputs keep theirs."""
    names: dict[ir.Value, str] = {}
    for signature in signatures:
        for value in signature.context:
            names.setdefault(value, name_of(value) if value.is_graph_input() else f"shared.{len(names)}")
    return names
