"""Insert slots of LoRA with a bias at linear layers.

    y += (((x A) * scaling) B) + bias * bias_scaling

Source: LoRA, arXiv 2106.09685, with `lora_bias` of PEFT's.
"""

from collections.abc import Mapping

import onnx_ir as ir

from edgepeft.slots import Slot
from edgepeft.techniques import lora_bias
from edgepeft.techniques.base import Settings
from edgepeft.techniques.lora import SCALING, A, B

from ..graph import append
from ..passes.weights.linears import Linear
from .base import BesideLinear, activation_axes, low_rank


class LoraBias(BesideLinear):
    """Its sites are linear modules."""

    name = lora_bias.NAME

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        del settings
        return lora_bias.new_slot(
            linear.module, linear.in_features, linear.out_features, activation_axes(linear)
        )

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        del slot
        assert x.shape is not None
        bias = inputs[lora_bias.BIAS]
        product = low_rank(graph, x, inputs[A], [inputs[SCALING]], inputs[B], list(x.shape)[:-1])
        added = append(graph, "Mul", [bias, inputs[lora_bias.BIAS_SCALING]], shape=bias.shape)
        return append(graph, "Add", [product, added], shape=product.shape)


GRAPH_TECHNIQUE = LoraBias()
