"""Insert slots for a prefix at the keys and values of every layer.

    keys = where(id is virtual, prefix_key[id - first_id], keys)        and so values

Virtual tokens are read like others, but nobody sees what they say: only their keys and values, which are the
prefix. Where a cache is at hand, it begins with them instead.

Source: arXiv 2101.00190.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError, UsageError
from edgepeft.slots import ATTENTION, Slot
from edgepeft.techniques import prefix_tuning
from edgepeft.techniques.base import Settings

from ..graph import append, initializer, put_behind
from ..options import ExportOptions
from ..passes.drop_cache import PAST
from ..passes.weights.embedding import TokenEmbedding, find_embedding
from ..sources.base import ModelSource
from ..virtual_tokens import check_virtual, first_id, look_up, only_real_tokens
from .base import BaseGraph, GraphTechnique, slot_inputs


class Layer(NamedTuple):
    """A layer's number and its new keys and values, `[batch, heads, sequence, head_dim]`."""

    number: int
    embedding: TokenEmbedding
    new: tuple[ir.Value, ir.Value]


class PrefixTuning(GraphTechnique[Layer]):
    """Its sites are the layers that have a cache: all of them."""

    name, site = prefix_tuning.NAME, ATTENTION

    def check(self, source: ModelSource, options: ExportOptions) -> None:
        """
        Raises:
            UsageError: PEFT has no prefix for such a model, or the loss compares with the base.
        """
        check_virtual(source, options, prefix_tuning.TECHNIQUE)
        if source.task != "text-generation":
            raise UsageError(
                f"prefix tuning is for language models, {source.name} is for {source.task}: use prompt_tuning"
            )

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """All layers; targets name none."""
        del source, options
        return {prefix_tuning.ALL: {}}

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[Layer]:
        """
        Raises:
            ExportError: the keys and values of a layer are not to be found.
        """
        if not modules:
            return []
        embedding = find_embedding(base.graph, base.weights)
        layers = [node for node in base.graph if node.op_type == "Attention" and not node.domain]
        found = []
        for number, node in enumerate(layers):
            key, value = (_new(operand) for operand in node.inputs[1:3])
            if key is not None and value is not None:
                found.append(Layer(number, embedding, (key, value)))
        if not found or len(found) != len(layers):
            raise ExportError(
                "prefix tuning puts keys and values in front of every layer's own, which this graph computes "
                "in another way than others: train a LoRA, or prompt tuning, instead"
            )
        return found

    def insert(self, base: BaseGraph, sites: Sequence[Layer]) -> list[Slot]:
        slots, graph = [], base.graph
        for number, embedding, new in sites:
            only_real_tokens(graph, embedding)
            heads, head_dim = _sizes(new[0])
            first = first_id(embedding, prefix_tuning.TECHNIQUE)
            slot = prefix_tuning.new_slot(number, first, heads, head_dim)
            for value, rows in zip(new, slot_inputs(graph, slot), strict=True):
                _replace(graph, slot, value, rows)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = PrefixTuning()


def _new(value: ir.Value | None) -> ir.Value | None:
    """The keys or values of a run's own tokens, without a cache in front, where they are of a known shape."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Concat" and (node.inputs[0].name or "").startswith(PAST):  # type: ignore[union-attr]
        value = node.inputs[1]
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    return value if all(isinstance(value.shape[axis], int) for axis in (1, 3)) else None


def _sizes(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    heads, head_dim = value.shape[1], value.shape[3]
    assert isinstance(heads, int)  # `_new` has looked
    assert isinstance(head_dim, int)
    return heads, head_dim


def _replace(graph: ir.Graph, slot: Slot, value: ir.Value, rows: ir.Value) -> None:
    """Have everything read the slot's rows where a token is virtual."""
    heads, head_dim = _sizes(value)
    keeps, added = look_up(graph, slot, rows)
    assert added.shape is not None
    assert keeps.shape is not None
    batch, sequence, _ = added.shape
    target = initializer(graph, f"heads_{heads}_{head_dim}", np.array([0, 0, heads, head_dim], np.int64))
    apart = append(graph, "Reshape", [added, target], shape=[batch, sequence, heads, head_dim])
    turned = append(
        graph, "Transpose", [apart], {"perm": [0, 2, 1, 3]}, shape=[batch, heads, sequence, head_dim]
    )
    axis = initializer(graph, "axis_1", np.array([1], np.int64))
    each = append(graph, "Unsqueeze", [keeps, axis], shape=[batch, 1, sequence, 1])
    put_behind(graph, value, "Add", turned)
    put_behind(graph, value, "Mul", each)
