"""From a forward graph to the graphs of its stages, and how each stage binds them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.bundle.manifest import Partition, Stage, VocabularyHead

from ..forward import Forward
from ..graph import tidy
from ..losses import Loss
from ..losses.causal_lm import causal_lm_loss
from ..passes.input_shapes import take_sizes_from_inputs
from ..writer import is_weight
from .context import build_context
from .cuts import Segment, ancestors, cut, dependences
from .signature import Signature, describe, find_period
from .stages import StageGraphs, build_head, build_stage
from .vocabulary_head import build_vocabulary_head, find_output_layer

CONTEXT_ROLE = "context"


@dataclass(frozen=True)
class Partitioned:
    """A chain of stages: its graphs by role, and the wiring for the manifest."""

    wiring: Partition
    graphs: dict[str, ir.Model]


def build_partition(forward: Forward, loss: Loss) -> Partitioned | None:
    """Cut `forward` into stages, equal ones sharing their graphs.

    Args:
        forward: the training forward graph, its weights frozen.
        loss: of the task.

    Returns:
        The chain, or None where the graph has no cut below which something trains.
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
    output = next(value for value in graph.outputs if value.name == loss.output)
    depends = dependences(graph, weight_names, adapter_names)
    segments = cut(graph, output, depends)
    pieces = group(segments, weight_names, adapter_names)
    layer = find_output_layer(pieces[-1], weight_names) if loss.function is causal_lm_loss else None
    if layer is not None:
        # What comes before the output layer, a normalization, is a stage of its own.
        pieces[-1:] = [] if layer.x is pieces[-1][0].hidden else [_ending_with(pieces[-1], layer.x)]
    signatures = [describe(piece, weight_names, adapter_names) for piece in pieces]
    trained = [index for index, signature in enumerate(signatures) if signature.adapter]
    if len(pieces) < 2 or not trained:
        return None
    names = _name_context(signatures)
    if any(depends[value].hidden for node in ancestors(names) for value in node.outputs):
        return None  # a size that only a hidden state has
    graphs: dict[str, ir.Model] = {}
    roles: dict[object, str] = {}
    built: dict[str, StageGraphs] = {}
    stages: list[Stage] = []
    for index, (piece, signature) in enumerate(zip(pieces, signatures, strict=True)):
        is_head = layer is None and index == len(pieces) - 1
        kind: object = "head" if is_head else signature.text
        if kind not in roles:
            role = roles[kind] = "head" if is_head else f"stage{len(roles)}"
            trains = any(signatures[i].text == signature.text for i in range(trained[0], len(pieces)))
            made = (
                build_head(piece, signature, loss)
                if is_head
                else build_stage(piece, signature, trains=trains)
            )
            built[role] = made
            parts = {"forward": made.forward, "output": made.output, "backward": made.backward}
            graphs |= {f"{role}.{name}": part for name, part in parts.items() if part is not None}
        role = roles[kind]
        stages.append(
            Stage(
                forward=f"{role}.forward",
                output=None if built[role].output is None else f"{role}.output",
                backward=f"{role}.backward" if index >= trained[0] else None,
                weights={f"weight.{i}": _name(value) for i, value in enumerate(signature.weights)},
                adapter={f"adapter.{i}": _name(value) for i, value in enumerate(signature.adapter)},
                context={f"context.{i}": names[value] for i, value in enumerate(signature.context)},
            )
        )
    context, context_weights = build_context(graph, names, weight_names)
    if context is not None:
        graphs[CONTEXT_ROLE] = context
    head = None if layer is not None else stages.pop()
    sliced = None
    if layer is not None:
        graphs |= {f"head.{role}": model for role, model in build_vocabulary_head(layer).items()}
        weights_by_input = {f"weight.{i}": _name(value) for i, value in enumerate(layer.weights)}
        sliced = VocabularyHead(
            "head.scan",
            "head.loss",
            "head.backward",
            "head.backward_of_logits",
            weights_by_input,
            layer.rows,
        )
    wiring = Partition(
        None if context is None else CONTEXT_ROLE, context_weights, tuple(stages), head, sliced
    )
    return Partitioned(wiring, graphs)


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


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _name_context(signatures: Sequence[Signature]) -> dict[ir.Value, str]:
    """The values that stages take from the context, by the names they get there: model inputs keep theirs."""
    names: dict[ir.Value, str] = {}
    for signature in signatures:
        for value in signature.context:
            names.setdefault(value, _name(value) if value.is_graph_input() else f"shared.{len(names)}")
    return names
