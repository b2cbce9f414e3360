"""Insert HRA slots in front of linear layers: r reflections as two products.

    H₁ … H_r = I - U T Uᵀ;  x += -((x U) Tᵀ) Uᵀ

`U` are the vectors, each divided by its length. T is 2 on the diagonal and grows by blocks: of two chains
side by side, its corner is `-T₁ (U₁ᵀ U₂) T₂`, so that log₂ r steps on `[r, r]` make it.

Source: arXiv 2405.17484; the compact form: Schreiber and Van Loan, 1989 (LAPACK's larft).
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepeft.slots import Slot
from edgepeft.techniques import hra
from edgepeft.techniques.base import Settings

from ..graph import append, initializer
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import InFrontOfLinear, slot_rank, turned

# So that a vector of zeros, which reflects nothing, is divided by something.
_TINY = 1e-30


class Hra(InFrontOfLinear):
    """Its sites are linear modules."""

    name = hra.NAME

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        settings: Settings = {"r": slot_rank(options)}
        return dict.fromkeys(super().fresh_modules(source, options), settings)

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return hra.new_slot(linear.module, linear.in_features, int(settings["r"]))

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        in_features, rank = slot.tensor(hra.VECTORS).sized(0)
        assert x.shape is not None
        lead = list(x.shape)[:-1]
        units = _units(graph, inputs[hra.VECTORS], in_features, rank)
        rows = turned(graph, units)
        low = append(graph, "MatMul", [x, units], shape=[*lead, rank])
        mixed = append(
            graph, "MatMul", [low, turned(graph, _t(graph, units, rows, rank))], shape=[*lead, rank]
        )
        whole = append(graph, "MatMul", [mixed, rows], shape=[*lead, in_features])
        return append(graph, "Neg", [whole], shape=[*lead, in_features])


GRAPH_TECHNIQUE = Hra()


def _units(graph: ir.Graph, vectors: ir.Value, in_features: int, rank: int) -> ir.Value:
    """The columns divided by their lengths."""
    first = initializer(graph, "int64_0", np.array([0], np.int64))
    tiny = initializer(graph, "float_tiny", np.array(_TINY, np.float32))
    squares = append(graph, "Mul", [vectors, vectors], shape=[in_features, rank])
    total = append(graph, "ReduceSum", [squares, first], {"keepdims": 1}, shape=[1, rank])
    length = append(graph, "Sqrt", [total], shape=[1, rank])
    divisor = append(graph, "Add", [length, tiny], shape=[1, rank])
    return append(graph, "Div", [vectors, divisor], shape=[in_features, rank])


def _t(graph: ir.Graph, units: ir.Value, rows: ir.Value, rank: int) -> ir.Value:
    """T `[rank, rank]`, upper triangular."""
    shape = [rank, rank]
    gram = append(graph, "MatMul", [rows, units], shape=shape)
    t = initializer(graph, f"twice_{rank}", 2 * np.eye(rank, dtype=np.float32))
    place, block = np.arange(rank), 1
    while block < rank:
        pair, second = place // (2 * block), place // block % 2
        corner = (pair[:, None] == pair) & (second[:, None] < second)
        mask = initializer(graph, f"corners_{rank}_{block}", corner.astype(np.float32))
        between = append(graph, "Mul", [gram, mask], shape=shape)
        left = append(graph, "MatMul", [t, between], shape=shape)
        both = append(graph, "MatMul", [left, t], shape=shape)
        t = append(graph, "Sub", [t, both], shape=shape)
        block *= 2
    return t
