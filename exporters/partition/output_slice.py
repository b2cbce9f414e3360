"""The output layer of a language model, found in a graph, and a graph that has a slice of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph import INT64, MICROSOFT, append, initializer, new_model
from ..quantize.products import GROUP_INDEX, MINIMUMS, ZERO_POINTS, add_to_blocks, constants_of
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
    def block_size(self) -> int:
        """Columns that share a scale."""
        return self.product.attributes["block_size"].as_int()

    @property
    def row_sizes(self) -> list[int]:
        """Values of a row of each of `weights`."""
        return [math.prod(value.shape.numpy()[1:]) for value in self.weights if value.shape is not None]


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
    x, rows = node.inputs[0], node.attributes["N"].as_int()
    if x is None or any(value is not None for value in node.inputs[GROUP_INDEX:MINIMUMS]):
        return None
    weights = constants_of(node.inputs[1:])
    if weights is None:
        return None
    by_rows = all(value.shape is not None and value.shape[0] == rows for value in weights)
    if not by_rows or {value.name for value in weights} - weight_names:
        return None
    return OutputLayer(x, node, tuple(reversed(after)), logits, tuple(weights), rows)


def _elementwise_operand(node: ir.Node) -> ir.Value | None:
    """The operand of an elementwise node whose others are constant scalars, or None."""
    if node.domain or node.op_type not in ("Mul", "Div", "Add", "Sub", "Tanh", "Cast", "Identity"):
        return None
    computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    scalars = all(value.shape is not None and value.shape.rank() == 0 for value in constants)
    return computed[0] if len(computed) == 1 and scalars else None


def _steps(value: ir.Value, known: Collection[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that compute `value` of known values and constants, operands first."""
    node = value.producer()
    if value in known or node is None:
        return
    for operand in node.inputs:
        if operand is not None:
            yield from _steps(operand, known)
    yield node


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
        for place, (value, size) in enumerate(zip(layer.weights, layer.row_sizes, strict=True)):
            self._copier.add_input(value, f"weight.{place}", ir.Shape([ROWS, size]))
        packed, scales, zero_points, minimums = (
            self._computed(layer.product.inputs[place]) if place < len(layer.product.inputs) else None
            for place in (1, 2, ZERO_POINTS, MINIMUMS)
        )
        assert packed is not None
        self.zero, one = (initializer(graph, f"int64_{value}", np.array(value, np.int64)) for value in (0, 1))
        dims = append(graph, "Shape", [packed], {"start": 0, "end": 1}, shape=[1], dtype=INT64)
        self.count = append(graph, "Squeeze", [dims], shape=[], dtype=INT64)
        indices = append(graph, "Range", [self.zero, self.count, one], shape=[ROWS], dtype=INT64)
        self.weight = append(
            graph,
            "GatherBlockQuantized",
            [packed, indices, scales, *([] if zero_points is None else [zero_points])],
            {
                "gather_axis": 0,
                "quantize_axis": 1,
                **{name: layer.product.attributes[name].as_int() for name in ("bits", "block_size")},
            },
            shape=[ROWS, layer.columns],
            domain=MICROSOFT,
        )
        if minimums is not None:
            self.weight = add_to_blocks(graph, self.weight, minimums, layer.block_size)
        assert hidden.shape is not None
        shape = [*list(hidden.shape)[:-1], ROWS]
        self.product = append(
            graph, "FusedMatMul", [hidden, self.weight], {"transB": 1}, shape=shape, domain=MICROSOFT
        )

    def _computed(self, value: ir.Value | None) -> ir.Value | None:
        """What the layer computes of its weights before it multiplies, of some rows of them."""
        if value is None:
            return None
        values = self._copier.values
        for node in dict.fromkeys(_steps(value, values)):
            self._copier.copy(node)
            for output in node.outputs:
                rows = values[output]
                assert rows.shape is not None
                rows.shape = ir.Shape([ROWS, *list(rows.shape)[1:]])
        return values[value]

    def after(self, product: ir.Value) -> ir.Value:
        """What the layer makes of its product, of these products."""
        values = self._copier.values
        values[self._layer.product.outputs[0]] = product
        for node in self._layer.after:
            self._copier.copy(node)
            values[node.outputs[0]].shape = product.shape
        return values[self._layer.logits]
