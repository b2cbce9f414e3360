"""From a forward graph to the graphs of its stages, and how each stage binds them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.bundle.wiring import Partition, Stage, VocabularyHead

from ..forward import Forward
from ..losses import Loss
from ..losses.causal_lm import causal_lm_loss
from .context import build_context
from .lookups import looked_up
from .pieces import Uncut, cut_into_pieces, name_of
from .stages import StageGraphs, build_head, build_stage
from .vocabulary_head import build_vocabulary_head

CONTEXT_ROLE = "context"


@dataclass(frozen=True)
class Partitioned:
    """A chain of stages: its graphs by role, and the wiring for the manifest."""

    wiring: Partition
    graphs: dict[str, ir.Model]


def build_partition(forward: Forward, loss: Loss) -> Partitioned | Uncut:
    """Cut `forward` into stages, equal ones sharing their graphs.

    Args:
        forward: the training forward graph, its weights frozen.
        loss: of the task.

    Returns:
        The chain, or why there is none: the graph has no cut below which something trains.
    """
    cut = cut_into_pieces(forward, loss.output, slice_output=loss.function is causal_lm_loss)
    if isinstance(cut, Uncut):
        return cut
    pieces, signatures, names, layer = cut.pieces, cut.signatures, cut.names, cut.layer
    trained = [index for index, signature in enumerate(signatures) if signature.adapter]
    if not trained:
        return Uncut("none of its stages trains")
    inputs = {tensor.input for slot in forward.slots for tensor in slot.tensors if tensor.trains}
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
                build_head(piece, signature, inputs, loss)
                if is_head
                else build_stage(piece, signature, inputs, trains=trains)
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
                weights={f"weight.{i}": name_of(value) for i, value in enumerate(signature.weights)},
                adapter={f"adapter.{i}": name_of(value) for i, value in enumerate(signature.adapter)},
                context={f"context.{i}": names[value] for i, value in enumerate(signature.context)},
                lookups=looked_up(signature),
            )
        )
    context, context_weights = build_context(cut.graph, names, cut.weight_names)
    if context is not None:
        graphs[CONTEXT_ROLE] = context
    head = None if layer is not None else stages.pop()
    sliced = None
    if layer is not None:
        graphs |= {f"head.{role}": model for role, model in build_vocabulary_head(layer).items()}
        weights_by_input = {f"weight.{i}": name_of(value) for i, value in enumerate(layer.weights)}
        sliced = VocabularyHead(
            "head.scan",
            "head.spread",
            "head.loss",
            "head.cotangent",
            weights_by_input,
            layer.rows,
        )
    wiring = Partition(
        None if context is None else CONTEXT_ROLE, context_weights, tuple(stages), head, sliced
    )
    return Partitioned(wiring, graphs)
