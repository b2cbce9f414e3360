"""Insert MiSS slots at linear layers.

    y += (sum of x's parts of r features) M

Source: arXiv 2409.15371; keys and sizes as PEFT has them.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import Slot
from edgepeft.techniques import miss
from edgepeft.techniques.base import RANK, Settings

from ..graph import append, initializer
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import BaseGraph, BesideLinear, activation_axes, reshaped, slot_rank


class Miss(BesideLinear):
    """Its sites are linear modules."""

    name = miss.NAME

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names, with what they make."""
        found: list[tuple[Linear, Settings]] = [
            (linear, {**settings, miss.OUT_FEATURES: linear.out_features})
            for linear, settings in super().sites(base, modules)
        ]
        for linear, settings in found:
            if int(settings[RANK]) > linear.in_features:
                raise ExportError(
                    f"linear {linear.module} reads {linear.in_features} features, fewer than MiSS's rank of "
                    f"{settings[RANK]}: choose a smaller one"
                )
        return found

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        settings: Settings = {RANK: slot_rank(options), miss.MINI: 0}
        return dict.fromkeys(super().fresh_modules(source, options), settings)

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return miss.new_slot(linear.module, settings, activation_axes(linear))

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        rank, columns = slot.tensor(miss.BLOCK).sized(0)
        made = int(slot.settings[miss.OUT_FEATURES])
        assert x.shape is not None
        lead, width = list(x.shape)[:-1], x.shape[-1]
        assert isinstance(width, int)
        kept, parts = [0] * len(lead), -(-width // rank)
        if missing := parts * rank - width:
            pads = initializer(graph, f"columns_0_{missing}", np.array([0, missing], np.int64))
            last = initializer(graph, "axis_last", np.array([-1], np.int64))
            x = append(graph, "Pad", [x, pads, None, last], shape=[*lead, parts * rank])
        parted = reshaped(graph, x, [*kept, parts, rank], [*lead, parts, rank])
        axis = initializer(graph, "axis_before_last", np.array([-2], np.int64))
        low = append(graph, "ReduceSum", [parted, axis], {"keepdims": 0}, shape=[*lead, rank])
        product = append(graph, "MatMul", [low, inputs[miss.BLOCK]], shape=[*lead, columns])
        if columns == made:
            return product
        one = reshaped(graph, product, [*kept, 1, columns], [*lead, 1, columns])
        times = initializer(
            graph, f"size_{made // columns}_{columns}", np.array([made // columns, columns], np.int64)
        )
        repeated = append(graph, "Expand", [one, times], shape=[*lead, made // columns, columns])
        return reshaped(graph, repeated, [*kept, made], [*lead, made])


GRAPH_TECHNIQUE = Miss()
