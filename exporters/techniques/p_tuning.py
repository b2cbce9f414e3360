"""Insert slots for virtual tokens at the embedding of tokens, and for the network that makes them.

    hidden = where(id is virtual, (stored + mlp(embedding))[id - first_id], embeddings[id])

Source: arXiv 2103.10385.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from edgepeft.slots import EMBEDDING, Slot
from edgepeft.techniques import p_tuning
from edgepeft.techniques.base import Settings

from ..graph import append
from ..options import ExportOptions
from ..passes.weights.embedding import TokenEmbedding, find_embedding
from ..sources.base import ModelSource
from ..virtual_tokens import check_virtual, first_id, replace_virtual
from .base import BaseGraph, GraphTechnique, slot_inputs


class Site(NamedTuple):
    """The embedding of tokens, and whether there is a network beside."""

    embedding: TokenEmbedding
    encoder: bool


class PTuning(GraphTechnique[Site]):
    """Its site is the embedding of tokens."""

    name, site = p_tuning.NAME, EMBEDDING

    def check(self, source: ModelSource, options: ExportOptions) -> None:
        """
        Raises:
            UsageError: the model reads no tokens, or in two places, or the loss compares with the base.
        """
        check_virtual(source, options, p_tuning.TECHNIQUE)

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """The prompt and the network; targets name no others."""
        del source, options
        return {p_tuning.PROMPT: {}, p_tuning.ENCODER: {}}

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Site]:
        """
        Raises:
            ExportError: the graph has no embedding of tokens, or several.
        """
        if not modules:
            return []
        return [Site(find_embedding(base.graph, base.weights), p_tuning.ENCODER in modules)]

    def insert(self, base: BaseGraph, sites: Sequence[Site]) -> list[Slot]:
        slots = []
        for embedding, encoder in sites:
            first, width = first_id(embedding, p_tuning.TECHNIQUE), embedding.width
            slots.append(p_tuning.prompt_slot(first, width))
            (rows,) = slot_inputs(base.graph, slots[0])
            if encoder:
                slots.append(p_tuning.encoder_slot(first, width, width))
                rows = _with_encoder(base.graph, slots[-1], rows)
            replace_virtual(base.graph, embedding, slots[0], rows)
        return slots


GRAPH_TECHNIQUE = PTuning()


def _with_encoder(graph: ir.Graph, slot: Slot, stored: ir.Value) -> ir.Value:
    """`stored + mlp(embedding)` `[size, width]`; both have the same rows."""
    values, *layers = slot_inputs(graph, slot)
    assert values.shape is not None
    size = values.shape[0]
    for index in range(len(p_tuning.LAYERS)):
        weight, bias = layers[2 * index : 2 * index + 2]
        assert weight.shape is not None
        shape = [size, weight.shape[1]]
        values = append(
            graph, "Add", [append(graph, "MatMul", [values, weight], shape=shape), bias], shape=shape
        )
        if index < len(p_tuning.LAYERS) - 1:
            values = append(graph, "Relu", [values], shape=shape)
    return append(graph, "Add", [stored, values], shape=stored.shape)
