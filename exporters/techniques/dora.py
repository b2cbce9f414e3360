"""Insert DoRA slots at linear layers, without a weight of the layer's size in float32.

    y = m / n · (x Wᵀ) + (x A · s) (B · m / n) + b
    n² = ‖W‖² + Σ_rank C (2 · A Wᵀ + (A Aᵀ) C), C = s · B

`n` are the lengths of the rows of W + s·BA: the stored weight multiplies the rows of A as it does x, and the
lengths of its own rows are a constant. No gradient flows through `n`, as in PEFT.

Source: DoRA, arXiv 2402.09353, section 4.3.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import Slot
from edgepeft.techniques import dora
from edgepeft.techniques.base import Settings
from edgepeft.techniques.lora import SCALING, A, B

from ..graph import append, detach, initializer, put_behind
from ..passes.weights.linears import Linear, linear_products
from ..quantize.row_norms import row_norms
from .base import BaseGraph, BesideLinear, low_rank, slot_inputs, turned


class Dora(BesideLinear):
    """Its sites are linear modules with a weight of their own."""

    name = dora.NAME

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        del settings
        weight = f"{linear.module}.weight"
        return dora.new_slot(linear.module, linear.in_features, linear.out_features, f"{weight}.row_norms")

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        """`(x A · s) B`, where B has been multiplied by m / n."""
        del slot
        assert x.shape is not None
        return low_rank(graph, x, inputs[A], [inputs[SCALING]], inputs[B], list(x.shape)[:-1])

    def insert(self, base: BaseGraph, sites: Sequence[tuple[Linear, Settings]]) -> list[Slot]:
        slots, graph = [], base.graph
        for linear, settings in sites:
            slot, weight = self.slot(linear, settings), base.weights.get(f"{linear.module}.weight")
            if weight is None or {node for node, _ in linear_products(weight)} != set(linear.nodes):
                raise ExportError(
                    f"linear {linear.module} has no float weight of its own in the graph, so it takes no "
                    "DoRA: export the transformers model, or train a LoRA"
                )
            inputs = dict(zip((item.name for item in slot.tensors), slot_inputs(graph, slot), strict=True))
            shape = _shape(inputs[B])
            norms = _norms(graph, linear, weight, inputs)
            scale = append(graph, "Div", [inputs[dora.MAGNITUDE], norms], shape=norms.shape)
            inputs[B] = append(graph, "Mul", [inputs[B], scale], shape=shape)
            for node, x in linear.uses:
                output = _without_bias(graph, node)
                if output.shape is None or x.shape is None:
                    raise ExportError(
                        f"linear {linear.module}: the shape of its output is unknown, so it takes no DoRA"
                    )
                put_behind(graph, output, "Add", self.delta(graph, slot, inputs, x))
                put_behind(graph, output, "Mul", scale)
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = Dora()


def _norms(graph: ir.Graph, linear: Linear, weight: ir.Value, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """`n` `[out_features]`."""
    (rank,), out = _shape(inputs[SCALING]), linear.out_features
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    first = initializer(graph, "int64_0", np.array([0], np.int64))
    two = initializer(graph, "float_2", np.array(2, np.float32))
    column = append(graph, "Unsqueeze", [inputs[SCALING], last], shape=[rank, 1])
    c = append(graph, "Mul", [inputs[B], column], shape=[rank, out])
    rows = turned(graph, inputs[A])
    across = append(graph, "MatMul", [rows, turned(graph, weight)], shape=[rank, out])
    doubled = append(graph, "Mul", [across, two], shape=[rank, out])
    gram = append(graph, "MatMul", [rows, inputs[A]], shape=[rank, rank])
    own = append(graph, "MatMul", [gram, c], shape=[rank, out])
    both = append(graph, "Add", [doubled, own], shape=[rank, out])
    parts = append(graph, "Mul", [c, both], shape=[rank, out])
    added = append(graph, "ReduceSum", [parts, first], {"keepdims": 0}, shape=[out])
    stored = row_norms(graph, weight)
    squared = append(graph, "Mul", [stored, stored], shape=[out])
    whole = append(graph, "Add", [squared, added], shape=[out])
    return detach(append(graph, "Sqrt", [whole], shape=[out]))


def _without_bias(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """What the product makes; a bias that it adds itself, a node behind it adds."""
    output = node.outputs[0]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        node.replace_input_with(2, None)
        put_behind(graph, output, "Add", bias)
    return output


def _shape(value: ir.Value) -> list[int | ir.SymbolicDim]:
    assert value.shape is not None
    return list(value.shape)
