"""Quantized weights in a graph: what multiplies by one, what looks rows up in it.

A product is one `MatMulNBits` until its graph is written. Minimums are a seventh input of it, which the
operator does not have: `lower_minimums` takes it off. Scales and minimums that are stored in other types, or
in two levels, are computed by a few nodes, which onnxruntime folds where they are constants.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ..graph import FLOAT, MICROSOFT, append, initializer
from .layouts import BlockValues, QuantizedWeight, pack
from .table_weight import TableWeight

#: Inputs of `MatMulNBits`: the bias is its last one, minimums are ours.
ZERO_POINTS, GROUP_INDEX, BIAS, MINIMUMS = 3, 4, 5, 6


class QuantizedConstant:
    """A quantized weight among the constants of a graph, where every product and look-up reads the same
    bytes."""

    def __init__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> None:
        self._graph, self._name, self._weight = graph, name, weight
        self._attributes = {"bits": weight.bits, "block_size": weight.block_size}

    def multiply(self, x: ir.Value, shape: ir.Shape | None) -> ir.Value:
        """`x @ Wᵀ`, of that shape."""
        weight, (rows, columns) = self._weight, self._weight.shape
        if weight.order is not None:
            order = initializer(self._graph, f"{self._name}.order", weight.order)
            x = append(self._graph, "Gather", [x, order], {"axis": -1}, shape=x.shape)
        blocks = columns // weight.block_size
        scales = self._numbers("scales", weight.scales)
        codes = initializer(
            self._graph,
            f"{self._name}.q{weight.bits}",
            weight.packed.reshape(rows, blocks, weight.block_size * weight.bits // 8),
        )
        zero_points, minimums = self._zero_points(), self._minimums(scales)
        inputs = [x, codes, scales, zero_points, None, None, minimums]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"K": columns, "N": rows, **self._attributes}
        return append(self._graph, "MatMulNBits", inputs, attributes, shape=shape, domain=MICROSOFT)

    def look_up(self, ids: ir.Value, shape: ir.Shape) -> ir.Value:
        """Rows of the weight."""
        weight, graph, (_, columns) = self._weight, self._graph, self._weight.shape
        scales = self._numbers("scales", weight.scales)
        table = initializer(graph, f"{self._name}.q{weight.bits}.rows", weight.packed)
        zero_points, minimums = self._zero_points(), self._minimums(scales)
        inputs = [table, ids, scales, *([] if zero_points is None else [zero_points])]
        attributes = {"gather_axis": 0, "quantize_axis": 1, **self._attributes}
        rows = append(graph, "GatherBlockQuantized", inputs, attributes, shape=shape, domain=MICROSOFT)
        if minimums is not None:
            lead = list(shape)[:-1]
            blocks = columns // weight.block_size
            found = append(graph, "Gather", [minimums, ids], {"axis": 0}, shape=[*lead, blocks])
            rows = add_to_blocks(graph, rows, found, weight.block_size)
        if weight.order is not None:
            places = initializer(graph, f"{self._name}.places", np.argsort(weight.order))
            rows = append(graph, "Gather", [rows, places], {"axis": -1}, shape=shape)
        return rows

    def _zero_points(self) -> ir.Value | None:
        weight = self._weight
        if weight.zero_points is None or self._common_zero is not None:
            return None
        return initializer(self._graph, f"{self._name}.zero_points", pack(weight.zero_points, weight.bits))

    @property
    def _common_zero(self) -> int | None:
        """The code that is the minimum of every block, as in GGML's layouts; None where they differ.

        Read with the middle code for 0, and what that is put into the minimum, no zero points are stored, and
        the terms stay small.
        """
        weight = self._weight
        if weight.minimums is None or weight.zero_points is None:
            return None
        first = int(weight.zero_points.flat[0])
        return first if (weight.zero_points == first).all() else None

    def _minimums(self, scales: ir.Value) -> ir.Value | None:
        weight, graph, zero = self._weight, self._graph, self._common_zero
        if weight.minimums is None:
            return None
        minimums = self._numbers("minimums", weight.minimums)
        if zero is None or zero == weight.middle:
            return minimums
        codes = weight.middle - zero
        by = initializer(graph, f"float_{codes}", np.array(codes, np.float32))
        moved = append(graph, "Mul", [scales, by], shape=scales.shape)
        return append(graph, "Add", [minimums, moved], shape=scales.shape)

    def _numbers(self, kind: str, numbers: BlockValues) -> ir.Value:
        return block_values(self._graph, f"{self._name}.{kind}", numbers)


class TableConstant:
    """A weight of bitsandbytes' 4-bit codes among the constants of a graph; no operator looks up its rows."""

    def __init__(self, graph: ir.Graph, name: str, weight: TableWeight) -> None:
        self._graph, self._name, self._weight = graph, name, weight

    def multiply(self, x: ir.Value, shape: ir.Shape | None) -> ir.Value:
        """`x @ Wᵀ`, of that shape."""
        weight, (rows, columns) = self._weight, self._weight.shape
        codes = initializer(self._graph, f"{self._name}.bnb4", weight.packed)
        absmax = initializer(self._graph, f"{self._name}.absmax", weight.absmax)
        attributes = {
            "K": columns,
            "N": rows,
            "block_size": weight.block_size,
            "quant_type": weight.quant_type,
        }
        return append(
            self._graph, "MatMulBnb4", [x, codes, absmax], attributes, shape=shape, domain=MICROSOFT
        )


def block_values(graph: ir.Graph, name: str, numbers: BlockValues) -> ir.Value:
    """The numbers, float32 `[rows, blocks]`; what computes them knows the number of rows by its inputs
    alone, so that they can be taken of some rows."""
    rows, blocks = numbers.values.shape
    values = _as_float(graph, initializer(graph, name, numbers.values))
    if numbers.factors is None:
        return values
    groups = numbers.factors.shape[1]
    factors = _as_float(graph, initializer(graph, f"{name}.factors", numbers.factors))
    each = sizes(graph, 0, groups, blocks // groups)
    grouped = append(graph, "Reshape", [values, each], shape=[rows, groups, blocks // groups])
    spread = append(graph, "Unsqueeze", [factors, sizes(graph, 2)], shape=[rows, groups, 1])
    scaled = append(graph, "Mul", [grouped, spread], shape=[rows, groups, blocks // groups])
    return append(graph, "Reshape", [scaled, sizes(graph, 0, blocks)], shape=[rows, blocks])


def add_to_blocks(graph: ir.Graph, weight: ir.Value, minimums: ir.Value, block_size: int) -> ir.Value:
    """`weight` `[…, columns]` with `minimums` `[…, blocks]` added to all values of their blocks."""
    assert minimums.shape is not None
    *lead, blocks = minimums.shape
    assert isinstance(blocks, int)
    same = [0] * len(lead)
    split, joined = sizes(graph, *same, blocks, block_size), sizes(graph, *same, blocks * block_size)
    parts = append(graph, "Reshape", [weight, split], shape=[*lead, blocks, block_size])
    wide = append(graph, "Unsqueeze", [minimums, sizes(graph, -1)], shape=[*lead, blocks, 1])
    moved = append(graph, "Add", [parts, wide], shape=[*lead, blocks, block_size])
    return append(graph, "Reshape", [moved, joined], shape=weight.shape)


def sizes(graph: ir.Graph, *values: int) -> ir.Value:
    """The int64 constant `[len(values)]` of these sizes or axes; 0 keeps a size in a `Reshape`."""
    return initializer(graph, f"int64_{'_'.join(map(str, values))}", np.array(values, np.int64))


def constants_of(values: Iterable[ir.Value | None]) -> list[ir.Value] | None:
    """The constants with more than one axis that values are or are computed from, in the order in which they
    are read; None where one needs something else."""
    found: list[ir.Value] = []
    for value in values:
        if value is None:
            continue
        if value.is_initializer():
            constants: list[ir.Value] | None = (
                [value] if value.shape is not None and value.shape.rank() > 1 else []
            )
        else:
            node = value.producer()
            constants = None if node is None else constants_of(node.inputs)
        if constants is None:
            return None
        found += [constant for constant in constants if constant not in found]
    return found


def _as_float(graph: ir.Graph, value: ir.Value) -> ir.Value:
    if value.dtype == FLOAT:
        return value
    return append(graph, "Cast", [value], {"to": FLOAT}, shape=value.shape)
