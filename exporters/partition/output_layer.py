"""The graph of a slice of a language model's output layer: hidden, weight.* → logits.

`weight.*` are some rows of the layer, so neither the decoded layer nor its logits need exist whole.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph import tidy
from .output_slice import OutputLayer, OutputSlice


def build_output_layer(layer: OutputLayer) -> ir.Model:
    """The graph that makes the logits of the rows that it is given."""
    piece = OutputSlice(layer, "output_layer")
    logits = piece.after(piece.product)
    logits.name = "logits"
    piece.graph.outputs.append(logits)
    tidy(piece.model)
    return piece.model
