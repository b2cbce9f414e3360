"""Fold constants and fuse normalizations, activations and rotary embeddings of a traced forward graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
from onnxscript.rewriter import onnx_fusions
from onnxscript.rewriter.pattern import RewriteRule
from onnxscript.rewriter.rules.fusion import _layer_norm

from ..graph import OPSET_IMPORTS, tidy
from .attention.rotary import expand_rotary_caches
from .attention.standard import simplify_attention


def optimize_forward(model: ir.Model) -> None:
    """Optimize `model` in place with onnxscript's folding and fusions.

    Weights are graph inputs at this point (see `sources.tracing`), so none is folded, transposed or merged
    away.
    """
    with _tried_where_they_may_match():
        onnxscript.optimizer.optimize_ir(model)
        onnx_fusions.fuse(model)
        _layer_norm.fuse_layer_normalization(model)
    expand_rotary_caches(model.graph)
    simplify_attention(model.graph)
    model.graph.opset_imports.update(OPSET_IMPORTS)
    tidy(model)


@contextmanager
def _tried_where_they_may_match() -> Iterator[None]:
    """Have onnxscript try its rules at nodes of the operator that each begins at: it would try every rule at
    every node, and list the whole graph's nodes for a rule of several results before it looks at the one. A
    release that tries them elsewhere is left as it is."""
    try_rewrite = getattr(RewriteRule, "try_rewrite", None)
    if try_rewrite is None:
        yield
        return
    op_types: dict[RewriteRule, str | None] = {}

    def try_where_it_may_match(
        rule: RewriteRule, model: ir.Model, graph: Any, node: ir.Node, **options: Any
    ) -> Any:
        if rule not in op_types:
            op_types[rule] = _op_type(rule)
        if op_types[rule] not in (None, node.op_type):
            return None
        return try_rewrite(rule, model, graph, node, **options)

    RewriteRule.try_rewrite = try_where_it_may_match  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RewriteRule.try_rewrite = try_rewrite  # type: ignore[method-assign]


def _op_type(rule: RewriteRule) -> str | None:
    """The operator whose node is the first result of what the rule replaces; None where several may be."""
    pattern: Any = getattr(rule, "_target_pattern", None)
    try:
        return str(pattern.output_nodes[0].op_identifier()[1])
    except (AttributeError, IndexError, TypeError):
        return None
