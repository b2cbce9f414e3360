"""Insert a slot for virtual tokens at the embedding of tokens.

    hidden = where(id is virtual, prompt[id - first_id], embedding[id])

Source: arXiv 2104.08691.
"""

from collections.abc import Mapping, Sequence

from edgepeft.slots import EMBEDDING, Slot
from edgepeft.techniques import prompt_tuning
from edgepeft.techniques.base import Settings

from ..options import ExportOptions
from ..passes.weights.embedding import TokenEmbedding, find_embedding
from ..sources.base import ModelSource
from ..virtual_tokens import check_virtual, first_id, replace_virtual, standard_deviation
from .base import BaseGraph, GraphTechnique, slot_inputs


class PromptTuning(GraphTechnique[TokenEmbedding]):
    """Its site is the embedding of tokens."""

    name, site = prompt_tuning.NAME, EMBEDDING

    def check(self, source: ModelSource, options: ExportOptions) -> None:
        """
        Raises:
            UsageError: the model reads no tokens, or in two places, or the loss compares with the base.
        """
        check_virtual(source, options, prompt_tuning.TECHNIQUE)

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """The one that there is; targets name no others."""
        del source, options
        return {prompt_tuning.MODULE: {}}

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[TokenEmbedding]:
        """
        Raises:
            ExportError: the graph has no embedding of tokens, or several.
        """
        return [find_embedding(base.graph, base.weights)] if modules else []

    def insert(self, base: BaseGraph, sites: Sequence[TokenEmbedding]) -> list[Slot]:
        slots = []
        for site in sites:
            slot = prompt_tuning.new_slot(
                first_id(site, prompt_tuning.TECHNIQUE),
                site.width,
                standard_deviation(base.tensors[site.table.name or ""]),
            )
            (prompt,) = slot_inputs(base.graph, slot)
            replace_virtual(base.graph, site, slot, prompt)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = PromptTuning()
