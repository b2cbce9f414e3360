"""LoRA's dropout: in a training graph, what a module's `A` reads loses some of its values.

    y += ((drop(x) A) * scaling) B        drop(x) = x / (1 - p) where kept, else 0

Which values are dropped is a function of the input `dropout.MODULE`, int32 `[5]`, and of their places alone:
`[threshold, seeds…]`, where p is the share of int32's numbers below the threshold. So a backward pass that
computes `x` anew drops the same, whatever the number of threads, and a resumed update does. At the lowest
threshold nothing is dropped, and the graph computes what it would without. No operator of ONNX that draws
numbers can be told where to begin at each run.

A place's number is the product of two sums of hashes, `(u₁[row] + v₁[column]) (u₂[row] + v₂[column])` modulo
2³², where the first sum is odd: so the product is uniform. It is computed in passes over x by whole numbers,
and is kept nowhere.
"""

import dataclasses
from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from edgepeft.adapters import Adapter
from edgepeft.bundle.wiring import DROPOUT
from edgepeft.slots import LINEAR, LORA
from edgepeft.techniques import lora

from ..forward import Forward
from ..graph import FLOAT, INT64, append, detach, graph_input, initializer, tidy

_INT32 = ir.DataType.INT32
#: Multipliers of the hash: odd, their bits as good as random (those of MurmurHash3's finalizer, and of golden
#: ratios).
_FIRST, _SECOND = -2048144789, -1028477387
_STRIDES = (-1640531535, 1013904223, 374761393, 668265263)
_HALVES = 2**16


def dropped_modules(adapters: Iterable[Adapter]) -> set[str]:
    """Modules in front of whose LoRA one of the adapters wants something dropped."""
    return {
        module
        for adapter in adapters
        if adapter.technique.name == LORA and adapter.config.get("lora_dropout")
        for module in adapter.modules
    }


def with_dropout(forward: Forward, modules: Collection[str]) -> Forward:
    """`forward` with an input `dropout.MODULE` for each of the modules that has a LoRA on a linear; the graph
    itself stays as it is."""
    slots = [
        slot
        for slot in forward.slots
        if slot.technique == LORA and slot.site == LINEAR and slot.module in modules
    ]
    if not slots:
        return forward
    model = forward.model.clone()
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    for slot in slots:
        lora_a = inputs[slot.input(lora.A)]
        drawn = graph_input(graph, f"{DROPOUT}{slot.module}", [5], _INT32)
        for number, (product, position) in enumerate(list(lora_a.uses())):
            x = product.inputs[0]
            assert position == 1
            assert x is not None
            product.replace_input_with(0, _dropped(graph, x, lora.features(slot)[0], drawn, number))
            _rescale(graph, product.outputs[0], drawn)
    tidy(model)
    return dataclasses.replace(forward, model=model)


def _dropped(graph: ir.Graph, x: ir.Value, width: int, drawn: ir.Value, number: int) -> ir.Value:
    """`x` `[…, width]` without what is dropped; `number` tells the uses of a module apart."""
    assert x.shape is not None
    lead = list(x.shape)[:-1]
    one = initializer(graph, "int64_axis_1", np.array([1], np.int64))
    sizes = append(graph, "Shape", [x], {"end": -1}, shape=[len(lead)], dtype=INT64)
    detach(sizes)
    count = append(graph, "ReduceProd", [sizes], {"keepdims": 0}, shape=[], dtype=INT64)
    zero, step = (initializer(graph, f"int64_{n}", np.array(n, np.int64)) for n in (0, 1))
    places = append(graph, "Range", [zero, count, step], shape=[None], dtype=INT64)
    rows = append(graph, "Cast", [places], {"to": int(_INT32)}, shape=[None], dtype=_INT32)
    column = append(graph, "Concat", [sizes, one], {"axis": 0}, shape=[len(lead) + 1], dtype=INT64)
    columns = append(
        graph,
        "Range",
        [_number(graph, 0), _number(graph, width), _number(graph, 1)],
        shape=[width],
        dtype=_INT32,
    )
    sums = []
    for index in (0, 1):
        of_rows, of_columns = (
            _hashed(graph, value, drawn, 2 * index + side, number)
            for side, value in enumerate((rows, columns))
        )
        if index == 0:  # an even and an odd number
            of_rows = _int32(graph, "Mul", of_rows, _number(graph, 2))
            of_columns = _int32(graph, "Mul", of_columns, _number(graph, 2))
            of_columns = _int32(graph, "Add", of_columns, _number(graph, 1))
        of_rows = append(graph, "Reshape", [of_rows, column], shape=[*lead, 1], dtype=_INT32)
        sums.append(append(graph, "Add", [of_rows, of_columns], shape=[*lead, width], dtype=_INT32))
    drawn_numbers = append(graph, "Mul", sums, shape=[*lead, width], dtype=_INT32)
    is_dropped = append(
        graph,
        "Less",
        [drawn_numbers, _entry(graph, drawn, 0)],
        shape=[*lead, width],
        dtype=ir.DataType.BOOL,
    )
    nothing = initializer(graph, "zero_float32", np.array(0, np.float32))
    return append(graph, "Where", [is_dropped, nothing, x], shape=[*lead, width])


def _rescale(graph: ir.Graph, low_rank: ir.Value, drawn: ir.Value) -> None:
    """Have what reads `low_rank` read it divided by the share that was kept."""
    readers = list(low_rank.uses())
    threshold = append(graph, "Cast", [_entry(graph, drawn, 0)], {"to": int(FLOAT)}, shape=[1])
    share = initializer(graph, "dropout_share", np.array(2.0**-32, np.float32))
    kept = append(graph, "Mul", [threshold, share], shape=[1])
    half = initializer(graph, "half_float32", np.array(0.5, np.float32))
    kept = append(graph, "Sub", [half, kept], shape=[1])
    scaled = append(graph, "Div", [low_rank, kept], shape=low_rank.shape)
    for reader, position in readers:
        reader.replace_input_with(position, scaled)


def _hashed(graph: ir.Graph, places: ir.Value, drawn: ir.Value, index: int, number: int) -> ir.Value:
    """A hash of each place int32 `[n]` and of a seed of `drawn`."""
    value = _int32(graph, "Mul", places, _number(graph, _STRIDES[index]))
    value = _int32(graph, "Add", value, _entry(graph, drawn, 1 + index))
    if number:
        value = _int32(graph, "Add", value, _number(graph, number))
    for multiplier in (_FIRST, _SECOND):
        upper = _int32(graph, "Div", value, _number(graph, _HALVES))
        value = _int32(graph, "BitwiseXor", value, upper)
        value = _int32(graph, "Mul", value, _number(graph, multiplier))
    upper = _int32(graph, "Div", value, _number(graph, _HALVES))
    return _int32(graph, "BitwiseXor", value, upper)


def _entry(graph: ir.Graph, drawn: ir.Value, index: int) -> ir.Value:
    """One of the numbers of `drawn`, int32 `[1]`."""
    place = initializer(graph, f"int64_axis_{index}", np.array([index], np.int64))
    return append(graph, "Gather", [drawn, place], {"axis": 0}, shape=[1], dtype=_INT32)


def _int32(graph: ir.Graph, op_type: str, value: ir.Value, other: ir.Value) -> ir.Value:
    return append(graph, op_type, [value, other], shape=value.shape, dtype=_INT32)


def _number(graph: ir.Graph, value: int) -> ir.Value:
    return initializer(graph, f"int32_{value}", np.array(value, np.int32))
