"""Insert a slot that replaces rows of the embedding of tokens, and of a layer that is tied to it.

    y = W[id] (1 - Σ_i [id = t_i]) + Σ_i [id = t_i] rows_i
    logits = (h Wᵀ) (1 - Σ_i e_{t_i}) + (h rowsᵀ) e_t         tied; e_t are rows of the identity

Tokens are compared with the few that are replaced, so nothing is copied that is as large as the table, and
the backward pass has products only, no scatter.

Source: `peft.tuners.trainable_tokens.layer.TrainableTokensLayer`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import EMBEDDING, TRAINABLE_TOKENS, Slot
from edgepeft.techniques import trainable_tokens
from edgepeft.techniques.base import Settings

from ..graph import FLOAT, Shape, append, constant_where, initializer, put_behind
from ..options import ExportOptions
from ..passes.weights.embedding import TokenEmbedding, find_embedding, scopes
from ..passes.weights.linears import linear_products
from ..sources.base import ModelSource
from ..sources.transformers_model import Source
from .base import BaseGraph, GraphTechnique, slot_inputs, turned

_BOOL = ir.DataType.BOOL


class TrainableTokens(GraphTechnique[tuple[str, TokenEmbedding]]):
    """Its site is the embedding of tokens."""

    name, site = TRAINABLE_TOKENS, EMBEDDING

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """The embedding of tokens; targets name no others."""
        del options
        if not isinstance(source, Source):
            raise ExportError(f"{source.name} does not say which module looks tokens up: give an adapter")
        embedding = source.model.get_input_embeddings()
        return {name: {} for name, module in source.model.named_modules() if module is embedding}

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[str, TokenEmbedding]]:
        """
        Raises:
            ExportError: a module is not the embedding of tokens, or its rows cannot be replaced.
        """
        if not modules:
            return []
        embedding = find_embedding(base.graph, base.weights)
        for module in modules:
            if module not in scopes(embedding.lookup):
                raise ExportError(
                    f"module {module} is not what looks tokens up: rows are replaced of the embedding of "
                    "tokens alone, train the adapter without it"
                )
        head = (embedding.table.name or "").removesuffix(".weight")
        if linear_products(embedding.table) and f"{head}.bias" in base.weights:
            raise ExportError(
                f"module {head} is tied to the embedding and has a bias, which PEFT leaves out where "
                "rows are replaced: train the adapter without trainable tokens"
            )
        return [(module, embedding) for module in modules]

    def insert(self, base: BaseGraph, sites: Sequence[tuple[str, TokenEmbedding]]) -> list[Slot]:
        slots = []
        for module, embedding in sites:
            slot = trainable_tokens.new_slot(module, embedding.width)
            rows, tokens = slot_inputs(base.graph, slot)
            padding_idx = base.lookups[module].padding_idx if module in base.lookups else None
            _look_up(base.graph, embedding, rows, tokens, padding_idx)
            for node, x in linear_products(embedding.table):
                _multiply(base.graph, embedding, node.outputs[0], x, rows, tokens)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = TrainableTokens()


def _look_up(
    graph: ir.Graph, embedding: TokenEmbedding, rows: ir.Value, tokens: ir.Value, padding_idx: int | None
) -> None:
    """In front of whatever the module does with what it has looked up: some scale it. As PyTorch has it, a
    row that is looked up as padding gets no gradient from that."""
    ids, output = embedding.lookup.inputs[1], embedding.lookup.outputs[0]
    assert ids is not None
    assert ids.shape is not None
    assert tokens.shape is not None
    (count,) = tokens.shape
    lead = list(ids.shape)
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    numbers = append(graph, "Cast", [ids], {"to": int(FLOAT)}, shape=lead)
    column = append(graph, "Unsqueeze", [numbers, last], shape=[*lead, 1])
    equal = append(graph, "Equal", [column, tokens], shape=[*lead, count], dtype=_BOOL)
    chosen = append(graph, "Cast", [equal], {"to": int(FLOAT)}, shape=[*lead, count])
    replaced = append(graph, "MatMul", [chosen, rows], shape=[*lead, embedding.width])
    if padding_idx is not None:
        token = initializer(graph, f"float32_{padding_idx}", np.array(padding_idx, np.float32))
        pads = append(graph, "Equal", [column, token], shape=[*lead, 1], dtype=_BOOL)
        replaced = constant_where(graph, pads, replaced)
    put_behind(graph, output, "Add", replaced)
    put_behind(graph, output, "Mul", _kept(graph, chosen, last, [*lead, 1]))


def _multiply(
    graph: ir.Graph,
    embedding: TokenEmbedding,
    logits: ir.Value,
    x: ir.Value,
    rows: ir.Value,
    tokens: ir.Value,
) -> None:
    """Behind a product with the table."""
    table = embedding.table.shape
    assert table is not None
    assert tokens.shape is not None
    if logits.shape is None:
        raise ExportError("the shape of the output layer's logits is unknown, so its rows stay as they are")
    (count,), (vocabulary, _) = tokens.shape, table.numpy()
    lead = list(logits.shape)[:-1]
    ends = (initializer(graph, f"float32_{n}", np.array(n, np.float32)) for n in (0, vocabulary, 1))
    every = append(graph, "Range", list(ends), shape=[vocabulary])
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    first = initializer(graph, "axis_first", np.array([0], np.int64))
    column = append(graph, "Unsqueeze", [tokens, last], shape=[count, 1])
    equal = append(graph, "Equal", [column, every], shape=[count, vocabulary], dtype=_BOOL)
    chosen = append(graph, "Cast", [equal], {"to": int(FLOAT)}, shape=[count, vocabulary])
    own = append(graph, "MatMul", [x, turned(graph, rows)], shape=[*lead, count])
    replaced = append(graph, "MatMul", [own, chosen], shape=[*lead, vocabulary])
    put_behind(graph, logits, "Add", replaced)
    put_behind(graph, logits, "Mul", _kept(graph, chosen, first, [1, vocabulary]))


def _kept(graph: ir.Graph, chosen: ir.Value, axis: ir.Value, shape: Shape) -> ir.Value:
    """1 where nothing is chosen along an axis, 0 where one is."""
    one = initializer(graph, "one_float32", np.array(1, np.float32))
    replaced = append(graph, "ReduceSum", [chosen, axis], {"keepdims": 1}, shape=shape)
    return append(graph, "Sub", [one, replaced], shape=shape)
