"""The inference graph as a chain of stages, for budgets that cannot hold it whole.

Cut and shared like the training graph, with two differences: a stage hands out its part of the key/value
cache, and the output layer of a language model makes logits rather than a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.bundle.memory_formula import UNKNOWN_MEMORY
from edgepeft.bundle.wiring import OutputLayer, Stage, StreamedInference

from ..forward import Forward
from ..passes.drop_cache import PRESENT
from .context import build_context
from .lookups import looked_up
from .output_layer import build_output_layer
from .pieces import Uncut, cut_into_pieces, name_of
from .signature import Signature
from .stages import build_inference_stage

CONTEXT_ROLE, OUTPUT_ROLE, STAGE_ROLE = "infer.context", "infer.output", "infer.stage"


@dataclass(frozen=True)
class StreamedGraphs:
    """The chain's graphs by role, and the wiring for the manifest, whose memory is still to be measured."""

    wiring: StreamedInference
    graphs: dict[str, ir.Model]


def build_streamed_inference(forward: Forward, *, slice_output: bool) -> StreamedGraphs | Uncut:
    """Cut an inference graph into stages, equal ones sharing their graphs.

    Args:
        forward: the graph, its weights frozen; its first output is the task's, the cache's parts are others.
        slice_output: run the output layer by slices of its rows where it is a product by a quantized matrix.

    Returns:
        The chain, or why there is none: the graph has no cut, or makes its cache where no stage does.
    """
    cut = cut_into_pieces(forward, None, slice_output=slice_output)
    if isinstance(cut, Uncut):
        return cut
    graph, names, layer = cut.graph, cut.names, cut.layer
    graphs: dict[str, ir.Model] = {}
    roles: dict[object, str] = {}
    stages: list[Stage] = []
    for piece, signature in zip(cut.pieces, cut.signatures, strict=True):
        presents = _presents(signature)
        kind = signature.text, tuple(place for place, _ in presents)
        if kind not in roles:
            role = roles[kind] = f"{STAGE_ROLE}{len(roles)}"
            graphs[role] = build_inference_stage(piece, signature, [value for _, value in presents])
        stages.append(
            Stage(
                forward=roles[kind],
                output=None,
                backward=None,
                weights={f"weight.{i}": name_of(value) for i, value in enumerate(signature.weights)},
                adapter={f"adapter.{i}": name_of(value) for i, value in enumerate(signature.adapter)},
                context={f"context.{i}": names[value] for i, value in enumerate(signature.context)},
                cache={f"present.{i}": name_of(value) for i, (_, value) in enumerate(presents)},
                lookups=looked_up(signature),
            )
        )
    cached = [name for stage in stages for name in stage.cache.values()]
    if sorted(cached) != sorted(filter(_is_cache, map(name_of, graph.outputs))):
        return Uncut("its key/value cache is not made by its layers")
    context, context_weights = build_context(graph, names, cut.weight_names)
    if context is not None:
        graphs[CONTEXT_ROLE] = context
    output = None
    if layer is not None:
        graphs[OUTPUT_ROLE] = build_output_layer(layer)
        weights = {f"weight.{i}": name_of(value) for i, value in enumerate(layer.weights)}
        output = OutputLayer(OUTPUT_ROLE, weights, layer.rows)
    wiring = StreamedInference(
        context=None if context is None else CONTEXT_ROLE,
        context_weights=context_weights,
        stages=tuple(stages),
        output_layer=output,
        memory=UNKNOWN_MEMORY,
    )
    return StreamedGraphs(wiring, graphs)


def _presents(signature: Signature) -> list[tuple[tuple[int, int], ir.Value]]:
    """The parts of the cache that a stage makes, each with its node's and output's place in the stage."""
    return [
        ((place, output.index() or 0), output)
        for place, node in enumerate(signature.nodes)
        for output in node.outputs
        if output.is_graph_output() and _is_cache(name_of(output))
    ]


def _is_cache(name: str) -> bool:
    """Whether an output of this name is a part of the key/value cache."""
    return name.startswith(PRESENT)
