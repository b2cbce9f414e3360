"""One stage's graphs: forward, and backward with the forward computed anew.

    forward    hidden, context.*, weight.*, adapter.*              → hidden.out
    backward   the same and cotangent (of hidden.out)              → hidden.cotangent, grad.adapter.*
    head       in the place of the last stage: hidden, …, labels   → loss (backward: the cotangents too)

Weights are inputs, so that one graph serves every equal stage and reads them from wherever they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..autodiff import differentiate
from ..graph import append, graph_input, new_model, tidy
from ..losses import Loss
from ..passes.decode_late import decode_late
from ..passes.decode_weights import decode_weights
from .copying import Copier
from .cuts import Segment
from .signature import Signature

HIDDEN, HIDDEN_OUT, COTANGENT, HIDDEN_COTANGENT = "hidden", "hidden.out", "cotangent", "hidden.cotangent"
GRADIENT_PREFIX = "grad."


@dataclass(frozen=True)
class StageGraphs:
    """A stage's two graphs."""

    forward: ir.Model
    backward: ir.Model


def build_stage(piece: Sequence[Segment], signature: Signature) -> StageGraphs:
    """The graphs of a stage between two cuts."""
    forward, _ = _extract(piece, signature)
    backward, trained = _extract(piece, signature)
    output = backward.graph.outputs[0]
    assert output.shape is not None
    cotangent = graph_input(backward.graph, COTANGENT, list(output.shape))
    _add_gradients(backward, output, cotangent, trained)
    return StageGraphs(forward, backward)


def build_inference_stage(
    piece: Sequence[Segment], signature: Signature, presents: Sequence[ir.Value]
) -> ir.Model:
    """The forward graph of a stage with its parts of the key/value cache as the outputs `present.*`."""
    model, _ = _extract(piece, signature, presents)
    decode_late(model.graph)
    tidy(model)
    return model


def build_head(piece: Sequence[Segment], signature: Signature, loss: Loss) -> StageGraphs:
    """The graphs of the last stage, with the loss."""
    models = []
    for with_gradients in (False, True):
        model, trained = _extract(piece, signature)
        output = model.graph.outputs[0]
        scalar = loss.build(model.graph, output)
        output.name = loss.output
        model.graph.outputs[:] = [scalar] if with_gradients else [scalar, output]
        tidy(model)
        if with_gradients:
            _add_gradients(model, scalar, None, trained, keep=[scalar])
        models.append(model)
    return StageGraphs(*models)


def _extract(
    piece: Sequence[Segment], signature: Signature, presents: Sequence[ir.Value] = ()
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
            if kind == "adapter" and not (value.name or "").endswith(".scaling"):
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
