"""Fold constants and fuse normalizations, activations and rotary embeddings of a traced forward graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
from onnxscript import rewriter
from onnxscript.rewriter import onnx_fusions
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
    """Have onnxscript try rules for several results (there is one, for slices) at nodes of their operator
    alone: it lists the whole graph's nodes before it looks at the one, which took most of the export of a
    language model. A release that keeps its rules elsewhere is left as it is."""
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is None:
        yield
        return
    guarded: Any = tuple(_Tried(rule) if _op_type(rule) else rule for rule in rules)
    rewriter._DEFAULT_REWRITE_RULES = guarded
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


def _op_type(rule: Any) -> str | None:
    """The operator of the first of a rule's several results; None of any other rule."""
    pattern = getattr(rule, "_target_pattern", None)
    if pattern is None or getattr(pattern, "has_single_output_node", True):
        return None
    try:
        return str(pattern.output_nodes[0].op_identifier()[1])
    except (AttributeError, IndexError, TypeError):
        return None


class _Tried:
    """A rule that is tried where its operator is."""

    def __init__(self, rule: Any) -> None:
        self._rule, self._op_type = rule, _op_type(rule)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
        """As the rule's."""
        if node.op_type != self._op_type:
            return None
        return self._rule.try_rewrite(model, graph, node, **options)
