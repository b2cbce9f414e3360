"""Insert AdaLoRA slots at linear layers.

    y = x Wᵀ + (((x A) * scaling) * E) B      A [in, rank], scaling [rank], E [1, rank], B [rank, out]

The inputs have a rank axis of their own, as LoRA's: one graph serves the ranks that training begins with and
those that are left. `scaling` may have the axes of x, `[batch, 1, …, rank]`.

Source: AdaLoRA, arXiv 2303.10512, equation 1; keys as PEFT writes them.
"""

from collections.abc import Mapping

import onnx_ir as ir

from edgepeft.slots import Slot
from edgepeft.techniques import adalora
from edgepeft.techniques.base import Settings
from edgepeft.techniques.lora import SCALING, A, B

from ..passes.weights.linears import Linear
from .base import BesideLinear, activation_axes, low_rank


class AdaLora(BesideLinear):
    """Its sites are linear modules."""

    name = adalora.NAME

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        del settings
        return adalora.new_slot(
            linear.module, linear.in_features, linear.out_features, activation_axes(linear)
        )

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        del slot
        assert x.shape is not None
        return low_rank(
            graph, x, inputs[A], [inputs[SCALING], inputs[adalora.E]], inputs[B], list(x.shape)[:-1]
        )


GRAPH_TECHNIQUE = AdaLora()
