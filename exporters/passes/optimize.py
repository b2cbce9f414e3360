"""Fold constants and fuse normalizations, activations and rotary embeddings of a traced forward graph."""

import onnx_ir as ir
import onnxscript.optimizer
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
    onnxscript.optimizer.optimize_ir(model)
    onnx_fusions.fuse(model)
    _layer_norm.fuse_layer_normalization(model)
    expand_rotary_caches(model.graph)
    simplify_attention(model.graph)
    model.graph.opset_imports.update(OPSET_IMPORTS)
    tidy(model)
