"""One stage's graphs.

    forward    hidden, context.*, weight.*, adapter.*                → kept.*
    output     the same and kept.*                                   → hidden.out
    backward   the same, kept.* and cotangent (of hidden.out)        → hidden.cotangent, grad.adapter.*
    head       in the place of the last stage: hidden, …, labels     → loss (forward: the output and, of a
                                                                       linear head, its features too;
                                                                       backward: the cotangents too)

`kept.*` is what the backward pass needs of the forward pass: it is held until then, or computed anew by
`forward` alone. A stage that nothing below trains, and one that keeps nothing, has no `output`: its
`forward` makes `hidden.out`. Weights are inputs, so that one graph serves every equal stage and reads them
from wherever they lie; each graph takes of the inputs above what it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..autodiff import differentiate
from ..graph import append, graph_input, new_model, tidy
from ..losses import Loss
from ..passes.weights.linear_head import add_features, find_linear_head
from ..quantize.decode import decode_weights
from ..quantize.decode_late import decode_late
from .copying import Copier
from .cuts import Segment, ancestors
from .saved import choose_saved
from .signature import Signature

HIDDEN, HIDDEN_OUT, COTANGENT, HIDDEN_COTANGENT = "hidden", "hidden.out", "cotangent", "hidden.cotangent"
GRADIENT_PREFIX, KEPT_PREFIX = "grad.", "kept."


@dataclass(frozen=True)
class StageGraphs:
    """A stage's graphs; None where it has no such graph."""

    forward: ir.Model
    output: ir.Model | None = None
    backward: ir.Model | None = None


def build_stage(
    piece: Sequence[Segment], signature: Signature, trained_inputs: Collection[str], *, trains: bool
) -> StageGraphs:
    """The graphs of a stage between two cuts; `trains`: a gradient passes it."""
    model, trained = _extract(piece, signature, trained_inputs)
    if not trains:
        return StageGraphs(model)
    graph = model.graph
    output = graph.outputs[0]
    assert output.shape is not None
    cotangent = graph_input(graph, COTANGENT, list(output.shape))
    _add_gradients(model, output, cotangent, trained, keep=[output])
    return _split(graph, output)


def build_inference_stage(
    piece: Sequence[Segment], signature: Signature, presents: Sequence[ir.Value]
) -> ir.Model:
    """The forward graph of a stage with its parts of the key/value cache as the outputs `present.*`."""
    model, _ = _extract(piece, signature, presents=presents)
    decode_late(model.graph)
    tidy(model)
    return model


def build_head(
    piece: Sequence[Segment], signature: Signature, trained_inputs: Collection[str], loss: Loss
) -> StageGraphs:
    """The graphs of the last stage, with the loss."""
    models = []
    for with_gradients in (False, True):
        model, trained = _extract(piece, signature, trained_inputs)
        output = model.graph.outputs[0]
        head = find_linear_head(output)
        scalar = loss.build(model.graph, output)
        output.name = loss.output
        model.graph.outputs[:] = [scalar] if with_gradients else [scalar, output]
        if head is not None and not with_gradients:
            add_features(model.graph, head)
        tidy(model)
        if with_gradients:
            _add_gradients(model, scalar, None, trained, keep=[scalar])
        models.append(model)
    return StageGraphs(models[0], backward=models[1])


def _split(graph: ir.Graph, output: ir.Value) -> StageGraphs:
    """A graph with forward and backward pass as one of each, and what lies between them."""
    forward = ancestors([output])
    saved = choose_saved(graph, forward)
    names = {value: f"{KEPT_PREFIX}{index}" for index, value in enumerate(saved.kept)}
    gradients = {value: value.name for value in graph.outputs if value is not output}
    behind = [node for node in graph if node not in forward]
    backward = _part(graph, [*saved.again, *behind], names, gradients)
    if not saved.kept:
        return StageGraphs(_part(graph, list(forward), {}, {output: HIDDEN_OUT}), backward=backward)
    before = ancestors(saved.kept)
    rest = ancestors([output], lambda value: value not in names)
    return StageGraphs(
        _part(graph, list(before), {}, names), _part(graph, list(rest), names, {output: HIDDEN_OUT}), backward
    )


def _part(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    given: Mapping[ir.Value, str],
    outputs: Mapping[ir.Value, str | None],
) -> ir.Model:
    """Some nodes of a graph as a model; its inputs are those they read, of the graph's and of `given`."""
    copier = Copier("stage")
    chosen = set(nodes)
    read = {value for node in chosen for value in node.inputs} | set(outputs)
    for value in graph.inputs:
        if value in read:
            assert value.name is not None
            copier.add_input(value, value.name)
    for value, name in given.items():
        if value in read:
            copier.add_input(value, name)
    for node in graph:
        if node in chosen:
            copier.copy(node)
    for value, output_name in outputs.items():
        copied = copier.values[value]
        if copied.is_graph_input():
            copied = append(copier.graph, "Identity", [copied], shape=value.shape, dtype=value.dtype)
        copied.name = output_name
        copier.graph.outputs.append(copied)
    model = new_model(copier.graph)
    decode_late(model.graph)
    tidy(model)
    return model


def _extract(
    piece: Sequence[Segment],
    signature: Signature,
    trained_inputs: Collection[str] = (),
    presents: Sequence[ir.Value] = (),
) -> tuple[ir.Model, list[ir.Value]]:
    """A piece as a model of its own, and of its inputs those that may have a gradient."""
    copier = Copier("stage")
    hidden = piece[0].hidden
    trained = []
    if hidden is not None:
        trained.append(copier.add_input(hidden, HIDDEN))
    for kind, values in (
        ("context", signature.context),
        ("weight", signature.weights),
        ("adapter", signature.adapter),
    ):
        for index, value in enumerate(values):
            copied = copier.add_input(value, f"{kind}.{index}")
            if kind == "adapter" and value.name in trained_inputs:
                trained.append(copied)
    for node in signature.nodes:
        copier.copy(node)
    output = copier.values[piece[-1].output]
    output.name = HIDDEN_OUT
    copier.graph.outputs.append(output)
    for index, present in enumerate(presents):
        copier.values[present].name = f"present.{index}"
        copier.graph.outputs.append(copier.values[present])
    model = new_model(copier.graph)
    decode_weights(model.graph)
    tidy(model)
    return model, trained


def _add_gradients(
    model: ir.Model,
    output: ir.Value,
    cotangent: ir.Value | None,
    trained: Sequence[ir.Value],
    keep: Sequence[ir.Value] = (),
) -> None:
    """Append the backward pass; the outputs are `keep` and the gradients."""
    graph = model.graph
    wanted = [value for value in trained if value.uses()]
    cotangents = differentiate(graph, output, wanted, cotangent=cotangent)
    graph.outputs[:] = list(keep)
    for value in wanted:
        gradient = cotangents[value]
        if gradient.is_graph_output() or gradient.is_graph_input():
            gradient = append(graph, "Identity", [gradient], shape=value.shape)
        gradient.name = HIDDEN_COTANGENT if value.name == HIDDEN else f"{GRADIENT_PREFIX}{value.name}"
        graph.outputs.append(gradient)
    tidy(model)
