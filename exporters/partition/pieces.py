"""A forward graph cut into pieces, each of which becomes a stage, and what they share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..forward import Forward
from ..graph import tidy
from ..passes.shapes.from_inputs import take_sizes_from_inputs
from ..writer import INLINE_BYTES, is_weight
from .cuts import Dependence, Segment, ancestors, cut, dependences
from .output_slice import OutputLayer, find_output_layer
from .signature import Signature, describe, describe_structure, find_period

#: Of these a stage reads what all stages share: positions, masks, rotary angles.
_SHARED_INPUTS = ("attention_mask", "position_ids")
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "MatMulBnb4", "FusedMatMul", "MatMulInteger")
_NUMBERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


@dataclass(frozen=True)
class Uncut:
    """Why a graph is not run in stages."""

    because: str


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


def cut_into_pieces(forward: Forward, output: str | None, *, slice_output: bool) -> Pieces | Uncut:
    """Cut a copy of a forward graph, its weights frozen.

    Args:
        forward: the graph.
        output: the output to cut for; its first one where None.
        slice_output: leave an output layer that can run by slices of its rows out of the pieces.

    Returns:
        The pieces, or why there are none: there is one piece only, or a size that only a hidden state has.
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
    adapter_names = {name for slot in forward.slots for name in slot.inputs}
    last = next(value for value in graph.outputs if output in (None, value.name))
    parameters = {name for name in weight_names if _is_parameter(graph.initializers[name])}
    small = {
        name
        for name, value in graph.initializers.items()
        if value.dtype not in _NUMBERS and name not in weight_names
    }
    for shared in ((), _SHARED_INPUTS):
        # Tables of angles and of masks are looked up with positions: read as parameters, they tie all layers
        # to one another.
        depends = dependences(graph, parameters, adapter_names, shared)
        segments = cut(graph, last, depends)
        pieces = max(
            (
                group(segments, depends, names, adapter_names)
                for names in (weight_names, weight_names | small)
            ),
            key=len,
        )
        if len(pieces) > 1:
            break
    else:
        return Uncut(
            "its layers are not the same computation of their weights"
            if len(segments) > 1
            else "nothing lies between its layers that everything passes through"
        )
    layer = find_output_layer(pieces[-1], weight_names) if slice_output else None
    if layer is not None:
        # What comes before the output layer, a normalization, is a stage of its own.
        pieces[-1:] = [] if layer.x is pieces[-1][0].hidden else [_ending_with(pieces[-1], layer.x)]
    weight_names |= _differing(pieces, weight_names, small, adapter_names)
    signatures = [describe(piece, weight_names, adapter_names) for piece in pieces]
    names = _name_context(signatures)
    if len(pieces) < 2:
        return Uncut("it is an output layer alone")
    if any(depends[value].hidden for node in ancestors(names) for value in node.outputs):
        return Uncut("something that all its layers share is computed from a hidden state")
    return Pieces(graph, weight_names, pieces, signatures, names, layer)


def _is_parameter(value: ir.Value) -> bool:
    """Whether a weight makes what is computed with it a hidden state: a matrix does, or a long vector. A
    number or a short vector may be a mask's least value, or the frequencies of rotary angles."""
    tensor = value.const_value
    assert tensor is not None
    wide = sum(dim > 1 for dim in tensor.shape.numpy()) > 1
    return tensor.dtype not in _NUMBERS and (wide or tensor.nbytes >= INLINE_BYTES)


def _differing(
    pieces: Sequence[Sequence[Segment]],
    weight_names: set[str],
    small: set[str],
    adapter_names: Collection[str],
) -> set[str]:
    """Of the `small` constants those in which pieces differ that are alike but for them: a scale, a bias of a
    few numbers. They are weights, whatever they are called."""
    alike: dict[object, list[Signature]] = {}
    for piece in pieces:
        signature = describe(piece, weight_names | small, adapter_names)
        alike.setdefault(signature.text, []).append(signature)
    found: set[str] = set()
    for signatures in alike.values():
        for values in zip(*(signature.weights for signature in signatures), strict=True):
            names = {name_of(value) for value in values}
            tensors = {value.const_value.tobytes() for value in values if value.const_value is not None}
            if names <= small and len(tensors) > 1:
                found |= names
    return found


def _ending_with(piece: Sequence[Segment], output: ir.Value) -> list[Segment]:
    """A piece up to one of its values, as one segment."""
    hidden = piece[0].hidden
    own = {node for segment in piece for node in segment.nodes}
    needed = ancestors([output], lambda value: value is not hidden and value.producer() in own)
    nodes = tuple(node for segment in piece for node in segment.nodes if node in needed)
    return [Segment(nodes, hidden, output)]


def group(
    segments: Sequence[Segment],
    depends: Mapping[ir.Value, Dependence],
    weight_names: Collection[str],
    adapter_names: Collection[str],
) -> list[list[Segment]]:
    """Segments as pieces: each repetition of a repeated run is one, what lies between such runs is one.

    A run counts where its unit multiplies by a parameter, as a layer does; the last piece is what follows the
    last run. Neither depends on where adapters are.
    """
    texts = [describe_structure([segment], weight_names, adapter_names) for segment in segments]
    multiplies = [any(_multiplies(node, depends) for node in segment.nodes) for segment in segments]

    def pieces_of(start: int, end: int) -> list[list[Segment]]:
        first, length, count = find_period(texts[start:end]) if any(multiplies[start:end]) else (0, 0, 0)
        first += start
        behind = first + length * count
        if count == 0 or not any(multiplies[first : first + length]):
            return [list(segments[start:end])] if start < end else []
        runs = [list(segments[first + i * length : first + (i + 1) * length]) for i in range(count)]
        return [*pieces_of(start, first), *runs, *pieces_of(behind, end)]

    return pieces_of(0, len(segments))


def _multiplies(node: ir.Node, depends: Mapping[ir.Value, Dependence]) -> bool:
    """Whether a node multiplies what it is given by a parameter, as a linear layer does."""
    if node.op_type not in _PRODUCTS:
        return False
    operands = [depends[value] for value in node.inputs if value is not None and value in depends]
    return any(operand.parameters and not operand.data for operand in operands)


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
