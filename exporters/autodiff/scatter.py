"""A cotangent that touches few elements of its primal, kept as indices and updates until it is summed.

A gather from `[tokens, vocab]` has a cotangent of one element per token. Turned into a dense tensor it would
cost another `[tokens, vocab]` of zeros and an addition; applied to the dense cotangent that the same primal
has from elsewhere, it costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from .emitter import Emitter


@dataclass(frozen=True)
class Scatter:
    """`updates` to be added to the primal's shape at `indices`.

    Attributes:
        indices: int64; ScatterElements' indices along `axis`, or ScatterND's where `axis` is None.
        updates: the cotangent's elements.
        axis: axis of ScatterElements, or None for ScatterND.
    """

    indices: ir.Value
    updates: ir.Value
    axis: int | None

    def add_to(self, emit: Emitter, dense: ir.Value) -> ir.Value:
        """Emits `dense` with the updates added; repeated indices add up."""
        return self._emit(emit, dense, {"reduction": "add"})

    def write_to(self, emit: Emitter, dense: ir.Value) -> ir.Value:
        """Emits `dense` with the updates in place of its elements."""
        return self._emit(emit, dense, {})

    def _emit(self, emit: Emitter, dense: ir.Value, attributes: dict[str, Any]) -> ir.Value:
        if attributes and dense.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            # onnxruntime adds up in these nowhere but on a GPU.
            wide = Scatter(self.indices, emit.cast(self.updates, ir.DataType.FLOAT), self.axis)
            total = wide._emit(emit, emit.cast(dense, ir.DataType.FLOAT), attributes)
            return emit.cast(total, dense.dtype)
        if self.axis is None:
            return emit.op("ScatterND", dense, self.indices, self.updates, like=dense, **attributes)
        attributes = {"axis": self.axis, **attributes}
        return emit.op("ScatterElements", dense, self.indices, self.updates, like=dense, **attributes)


def accumulate(emit: Emitter, primal: ir.Value, parts: list[ir.Value | Scatter]) -> ir.Value:
    """Sums the parts of one cotangent, in as few nodes as possible, to the shape of `primal`."""
    dense = [part for part in parts if isinstance(part, ir.Value)]
    if not dense:
        total = emit.zeros_like(primal)
    elif len(dense) == 1:
        total = dense[0]
    else:
        total = emit.op("Add" if len(dense) == 2 else "Sum", *dense, like=primal)
    for part in parts:
        if isinstance(part, Scatter):
            total = part.add_to(emit, total)
    return total
