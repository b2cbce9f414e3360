"""Insert LoRA slots at linear layers, embeddings and convolutions.

    y = x Wᵀ + ((x A) * scaling) B            A [in, rank], scaling [rank], B [rank, out]
    y = W[ids] + (A[ids] * scaling) B         A [num_embeddings, rank], B [rank, out]
    y = conv(x, W) + conv(conv(x, A) * scaling, B)    A [rank, in, kernel], B [out, rank, 1]

`A`, `B` and `scaling` are graph inputs with a rank axis of their own, so one graph serves any rank (0
switches the slot off exactly) and adapters mix by concatenation along the rank axis. `scaling` may have the
axes of x, `[batch, 1, …, rank]`, or of a convolution `[batch, rank]`: every row of the batch then has an
adapter of its own.

Source: LoRA, arXiv 2106.09685; keys as PEFT writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import CONVOLUTION, EMBEDDING, LINEAR, LORA, Slot
from edgepeft.techniques import lora, lora_sites
from edgepeft.techniques.base import Settings

from ..graph import append, constant_where, initializer, put_behind
from ..passes.weights.convolutions import Convolution, find_convolutions
from ..passes.weights.linears import Linear, find_embeddings, select
from ..sources.base import Lookup
from .base import (
    BaseGraph,
    GraphTechnique,
    activation_axes,
    in_columns,
    known_output,
    low_rank,
    slot_inputs,
)


@dataclass(frozen=True)
class Embedding:
    """An embedding `module`, whose rows `nodes` look up; the gradient leaves the row `padding_idx` out."""

    module: str
    nodes: tuple[ir.Node, ...]
    weight: ir.Value
    padding_idx: int | None


Site = Linear | Embedding | Convolution


class Lora(GraphTechnique[Site]):
    """Its sites are linear modules, and what adapters say is an embedding or a convolution."""

    name, site = LORA, LINEAR

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Site]:
        """The linears that these are the names of, or the ends of names; others by their names."""
        of_site: dict[str, list[str]] = {LINEAR: [], EMBEDDING: [], CONVOLUTION: []}
        for module, settings in modules.items():
            of_site[str(settings.get(lora_sites.SITE, LINEAR))].append(module)
        convolutions = find_convolutions(base.weights.values()) if of_site[CONVOLUTION] else {}
        for module in of_site[CONVOLUTION]:
            if module not in convolutions:
                raise ExportError(
                    f"module {module} is no convolution of this model without groups and dilation, which "
                    "a LoRA could be put beside: train the adapter without it"
                )
        return [
            *select(base.linears, of_site[LINEAR]).values(),
            *(_embedding(base, module) for module in of_site[EMBEDDING]),
            *(convolutions[module] for module in of_site[CONVOLUTION]),
        ]

    def insert(self, base: BaseGraph, sites: Sequence[Site]) -> list[Slot]:
        slots = []
        for place in sites:
            if isinstance(place, Linear):
                slot = lora.new_slot(
                    place.module, place.in_features, place.out_features, activation_axes(place)
                )
                _insert(base.graph, place, slot)
            elif isinstance(place, Embedding):
                assert place.weight.shape is not None
                rows, width = place.weight.shape.numpy()
                slot = lora_sites.embedding_slot(place.module, rows, width, activation_axes(place))
                _insert_lookup(base.graph, place, slot)
            else:
                assert place.weight.shape is not None
                outputs, channels, *kernel = place.weight.shape.numpy()
                slot = lora_sites.convolution_slot(
                    place.module, channels, outputs, kernel, activation_axes(place)
                )
                _insert_convolution(base.graph, place, slot)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = Lora()


def _embedding(base: BaseGraph, module: str) -> Embedding:
    """
    Raises:
        ExportError: it is none that the graph has for itself.
    """
    lookup = base.lookups.get(module, Lookup(f"{module}.weight", None, alone=True))
    weight = base.weights.get(lookup.weight)
    nodes = () if weight is None else tuple(found.node for found in find_embeddings([weight]))
    if not lookup.alone:
        raise ExportError(
            f"module {module} shares its table with other embeddings, which PEFT's LoRA is not on, so the "
            "graph cannot tell what reads it: train the adapter without it"
        )
    if weight is None or not nodes:
        raise ExportError(
            f"module {module} is no embedding with a float table in this model, so it takes no LoRA: train "
            "the adapter without it"
        )
    return Embedding(module, nodes, weight, lookup.padding_idx)


def _insert(graph: ir.Graph, linear: Linear, slot: Slot) -> None:
    lora_a, lora_b, scaling = slot_inputs(graph, slot)
    for node, x in linear.uses:
        output, shape = known_output(node, f"linear {linear.module}")
        delta = low_rank(graph, x, lora_a, [scaling], lora_b, shape[:-1])
        put_behind(graph, output, "Add", in_columns(graph, delta, linear.first, output))


def _insert_lookup(graph: ir.Graph, embedding: Embedding, slot: Slot) -> None:
    lora_a, lora_b, scaling = slot_inputs(graph, slot)
    assert scaling.shape is not None
    (rank,) = scaling.shape
    for node in embedding.nodes:
        output, shape = known_output(node, f"embedding {embedding.module}")
        ids, lead = node.inputs[1], shape[:-1]
        assert ids is not None
        rows = append(graph, "Gather", [lora_a, ids], {"axis": 0}, shape=[*lead, rank])
        if embedding.padding_idx is not None:
            rows = _without_gradient(graph, rows, ids, embedding.padding_idx)
        scaled = append(graph, "Mul", [rows, scaling], shape=[*lead, rank])
        delta = append(graph, "MatMul", [scaled, lora_b], shape=output.shape)
        put_behind(graph, output, "Add", delta)


def _without_gradient(graph: ir.Graph, rows: ir.Value, ids: ir.Value, padding_idx: int) -> ir.Value:
    """The same rows, but that none flows into those of the padding: so PyTorch looks them up."""
    assert rows.shape is not None
    lead = list(rows.shape)[:-1]
    token = initializer(graph, f"token_{padding_idx}_{ids.dtype}", np.array(padding_idx, _numpy(ids)))
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    pads = append(graph, "Equal", [ids, token], shape=lead, dtype=ir.DataType.BOOL)
    column = append(graph, "Unsqueeze", [pads, last], shape=[*lead, 1], dtype=ir.DataType.BOOL)
    return constant_where(graph, column, rows)


def _insert_convolution(graph: ir.Graph, convolution: Convolution, slot: Slot) -> None:
    lora_a, lora_b, scaling = slot_inputs(graph, slot)
    assert scaling.shape is not None
    (rank,) = scaling.shape
    for node in convolution.nodes:
        output, shape = known_output(node, f"convolution {convolution.module}")
        x, (batch, _, *places) = node.inputs[0], shape
        axes = [*range(-len(places), 0)]
        behind = initializer(graph, f"axes_last_{len(places)}", np.array(axes, np.int64))
        moves = {
            name: attribute
            for name, attribute in node.attributes.items()
            if name in ("strides", "pads", "auto_pad")
        }
        low_rank = append(graph, "Conv", [x, lora_a], moves, shape=[batch, rank, *places])
        factor = append(graph, "Unsqueeze", [scaling, behind], shape=[rank, *(1 for _ in places)])
        scaled = append(graph, "Mul", [low_rank, factor], shape=[batch, rank, *places])
        delta = append(graph, "Conv", [scaled, lora_b], shape=output.shape)
        put_behind(graph, output, "Add", delta)


def _numpy(value: ir.Value) -> np.dtype:
    return np.dtype(np.int64) if value.dtype is None else value.dtype.numpy()
