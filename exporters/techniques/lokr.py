"""Insert LoKr slots at linear layers, as two small products of a reshaped input.

    X = x as [in_blocks, in_block];  y += w1 (X w2ᵀ) · scaling, as [out_blocks · out_block]

A weight of the layer's size is never made.

Source: LyCORIS, arXiv 2309.14859; keys and sizes as PEFT has them.
"""

from collections.abc import Mapping

import onnx_ir as ir
from peft.tuners.lokr.layer import factorization

from edgepeft.slots import Slot
from edgepeft.techniques import lokr
from edgepeft.techniques.base import RANK, SCALING, Settings

from ..graph import append
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import BesideLinear, reshaped, slot_rank, turned


class LoKr(BesideLinear):
    """Its sites are linear modules."""

    name = lokr.NAME

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """With PEFT's default decomposition."""
        rank, sizes = slot_rank(options), source.linear_sizes()
        return {name: _settings(*sizes[name], rank) for name in super().fresh_modules(source, options)}

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return lokr.new_slot(linear.module, settings)

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        a, b, c, d = (int(slot.settings[name]) for name in lokr.SIZES)
        assert x.shape is not None
        lead = list(x.shape)[:-1]
        kept = [0] * len(lead)
        w1, w2 = (_whole(graph, matrix, inputs) for matrix in lokr.RANKS)
        parted = reshaped(graph, x, [*kept, c, d], [*lead, c, d])
        inner = append(graph, "MatMul", [parted, turned(graph, w2)], shape=[*lead, c, b])
        scaled = append(graph, "Mul", [inner, inputs[SCALING]], shape=[*lead, c, b])
        outer = append(graph, "MatMul", [w1, scaled], shape=[*lead, a, b])
        return reshaped(graph, outer, [*kept, a * b], [*lead, a * b])


GRAPH_TECHNIQUE = LoKr()


def _settings(out_features: int, in_features: int, rank: int) -> Settings:
    """As `peft.tuners.lokr.layer.LoKrLayer.update_layer` decides."""
    (a, b), (c, d) = factorization(out_features), factorization(in_features)
    sizes = dict(zip(lokr.SIZES, (a, b, c, d), strict=True))
    ranks = {"w1_rank": 0, "w2_rank": rank if rank < max(b, d) / 2 else 0}
    return sizes | ranks | {RANK: rank, lokr.FACTOR: -1, lokr.BOTH: False}


def _whole(graph: ir.Graph, matrix: str, inputs: Mapping[str, ir.Value]) -> ir.Value:
    if matrix in inputs:
        return inputs[matrix]
    up, down = inputs[f"{matrix}_a"], inputs[f"{matrix}_b"]
    assert up.shape is not None
    assert down.shape is not None
    return append(graph, "MatMul", [up, down], shape=[up.shape[0], down.shape[1]])
