"""The output layer of a language model, found in a graph, and a graph that has a slice of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph import INT64, MICROSOFT, append, graph_input, initializer, new_model
from .copying import Copier
from .cuts import Segment
from .stages import HIDDEN

ROWS = "vocabulary"


@dataclass(frozen=True)
class OutputLayer:
    """`logits = f(x Wᵀ)` with f elementwise: its product, what follows it, and its weights by rows."""

    x: ir.Value
    product: ir.Node
    after: tuple[ir.Node, ...]
    logits: ir.Value
    weights: tuple[ir.Value, ...]
    rows: int

    @property
    def columns(self) -> int:
        """Of W."""
        return self.product.attributes["K"].as_int()

    @property
    def blocks(self) -> dict[str, int]:
        """`bits` and `block_size` of the packed weights."""
        return {name: self.product.attributes[name].as_int() for name in ("bits", "block_size")}

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Bytes of a row's packed weights, and the number of its scales."""
        return self.columns * self.blocks["bits"] // 8, self.columns // self.blocks["block_size"]


def find_output_layer(piece: Sequence[Segment], weight_names: set[str]) -> OutputLayer | None:
    """The output layer at the end of a piece, or None where it is no plain product by a quantized matrix."""
    logits = piece[-1].output
    nodes = {node for segment in piece for node in segment.nodes}
    after: list[ir.Node] = []
    value = logits
    while True:
        node = value.producer()
        if node is None or node not in nodes:
            return None
        if node.op_type == "MatMulNBits":
            break
        operand = _elementwise_operand(node)
        if operand is None:
            return None
        after.append(node)
        value = operand
    x, packed, scales = node.inputs[:3]
    plain = x is not None and packed is not None and scales is not None and len(node.inputs) == 3
    if not plain or {packed.name, scales.name} - weight_names:  # type: ignore[union-attr]
        return None
    assert x is not None
    assert packed is not None
    assert scales is not None
    rows = node.attributes["N"].as_int()
    return OutputLayer(x, node, tuple(reversed(after)), logits, (packed, scales), rows)


def _elementwise_operand(node: ir.Node) -> ir.Value | None:
    """The operand of an elementwise node whose others are constant scalars, or None."""
    if node.domain or node.op_type not in ("Mul", "Div", "Add", "Sub", "Tanh", "Cast", "Identity"):
        return None
    computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    scalars = all(value.shape is not None and value.shape.rank() == 0 for value in constants)
    return computed[0] if len(computed) == 1 and scalars else None


class OutputSlice:
    """A graph of some rows of the layer: hidden, weight.* → product, without outputs.

    Attributes:
        count: how many rows there are, int64 scalar.
        zero: the int64 scalar 0.
        weight: the rows, decoded.
        product: what they make of `hidden`, float32 `[…, vocabulary]`.
    """

    def __init__(self, layer: OutputLayer, name: str) -> None:
        self._layer, self._copier = layer, Copier(name)
        self.graph = graph = self._copier.graph
        self.model = new_model(graph)
        hidden = self._copier.add_input(layer.x, HIDDEN)
        row_bytes, row_scales = layer.row_sizes
        packed = graph_input(graph, "weight.0", [ROWS, row_bytes], ir.DataType.UINT8)
        scales = graph_input(graph, "weight.1", [ROWS, row_scales])
        self.zero, one = (initializer(graph, f"int64_{value}", np.array(value, np.int64)) for value in (0, 1))
        size = append(graph, "Shape", [packed], {"start": 0, "end": 1}, shape=[1], dtype=INT64)
        self.count = append(graph, "Squeeze", [size], shape=[], dtype=INT64)
        indices = append(graph, "Range", [self.zero, self.count, one], shape=[ROWS], dtype=INT64)
        self.weight = append(
            graph,
            "GatherBlockQuantized",
            [packed, indices, scales],
            {"gather_axis": 0, "quantize_axis": 1, **layer.blocks},
            shape=[ROWS, layer.columns],
            domain=MICROSOFT,
        )
        assert hidden.shape is not None
        shape = [*list(hidden.shape)[:-1], ROWS]
        self.product = append(
            graph, "FusedMatMul", [hidden, self.weight], {"transB": 1}, shape=shape, domain=MICROSOFT
        )

    def after(self, product: ir.Value) -> ir.Value:
        """What the layer makes of its product, of these products."""
        values = self._copier.values
        values[self._layer.product.outputs[0]] = product
        for node in self._layer.after:
            self._copier.copy(node)
            values[node.outputs[0]].shape = product.shape
        return values[self._layer.logits]
