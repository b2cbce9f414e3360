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
from .base import BesideLinear, activation_axes


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
        scaling, bias = inputs[SCALING], inputs[lora_bias.BIAS]
        assert x.shape is not None
        assert scaling.shape is not None
        assert bias.shape is not None
        lead, rank, out = list(x.shape)[:-1], scaling.shape[0], bias.shape[0]
        low_rank = append(graph, "MatMul", [x, inputs[A]], shape=[*lead, rank])
        scaled = append(graph, "Mul", [low_rank, scaling], shape=[*lead, rank])
        product = append(graph, "MatMul", [scaled, inputs[B]], shape=[*lead, out])
        added = append(graph, "Mul", [bias, inputs[lora_bias.BIAS_SCALING]], shape=[out])
        return append(graph, "Add", [product, added], shape=[*lead, out])


GRAPH_TECHNIQUE = LoraBias()
