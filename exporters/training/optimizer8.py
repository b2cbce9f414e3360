"""AdamW whose moments are kept in 8 bits: blocks of 256 values share a float32 scale.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, with the dynamic
map of bitsandbytes (`create_dynamic_map`).

A moment divided by its block's largest magnitude lies in [-1, 1] and is stored as the number of the nearest
entry of a code book of 256. The book spends its codes on seven decades, from 1e-7 to 1: decade `i` (0 the
lowest) is cut into `2^i` equal parts (`2^(i+1)` for the second moment, which needs no sign) and a code stands
for a part's middle; zero and one have codes of their own. Small values so keep their order of magnitude,
large ones up to 7 bits of it.

Nothing is searched. Entries lie the farther apart the larger they are, so the curve through the points
(midpoint of two entries, number of the upper one) is concave: the minimum of a few straight lines, and a
value's number is the whole part of it.

One thing differs from bitsandbytes: a second moment above zero never becomes zero but at least the smallest
entry. What is divided by its root would otherwise be divided by epsilon.
"""

import itertools

import numpy as np
import onnx_ir as ir

from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES

from ..graph import FLOAT, append, graph_input, initializer, new_model, tidy
from .optimizer import adamw_step

DECADES = 7
_BLOCK = OPTIMIZER_STATES["8bit"].block
_INT32, _UINT8 = ir.DataType.INT32, ir.DataType.UINT8
_TINY = float(np.finfo(np.float32).tiny)


def dynamic_map(*, signed: bool) -> np.ndarray:
    """The code book, float32 `[256]`, ascending."""
    positive = _positive_entries(signed)
    negative = -positive[::-1] if signed else positive[:0]
    return np.concatenate([negative, [0.0], positive, [1.0]]).astype(np.float32)


def build_adamw8() -> ir.Model:
    """One step of `build_adamw` on `param`, `grad` float32 `[n]`, `n` a multiple of 256.

    `exp_avg` and `exp_avg_sq` are codes, uint8 `[n]`; `exp_avg_absmax` and `exp_avg_sq_absmax` the blocks'
    largest magnitudes, float32 `[n / 256]`. The step itself sees the new moments before they are rounded.
    """
    graph = ir.Graph([], [], nodes=[], name="adamw8")
    model = new_model(graph)
    param, grad = (_blocks(graph, graph_input(graph, name, ["n"])) for name in ("param", "grad"))
    signs = {"exp_avg": True, "exp_avg_sq": False}
    moments = []
    for name, signed in signs.items():
        codes = graph_input(graph, name, ["n"], _UINT8)
        absmax = graph_input(graph, f"{name}_absmax", ["blocks"])
        moments.append(_decoded(graph, codes, absmax, signed))
    updated, *stepped = adamw_step(graph, param, grad, *moments)
    outputs = {"param": _flat(graph, updated, "n")}
    for (name, signed), moment in zip(signs.items(), stepped, strict=True):
        codes, absmax = _encoded(graph, moment, signed)
        outputs |= {name: _flat(graph, codes, "n"), f"{name}_absmax": _flat(graph, absmax, "blocks")}
    for name, value in outputs.items():
        value.name = f"{name}_out"
        graph.outputs.append(value)
    tidy(model)
    return model


def _positive_entries(signed: bool) -> np.ndarray:
    """The entries between zero and one, float64."""
    middles = []
    for decade in range(DECADES):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (0 if signed else 1)) + 1)
        middles.append(10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2)
    return np.concatenate(middles)


def _midpoints(signed: bool) -> np.ndarray:
    """Magnitudes from which the next entry is the nearest, float64; the last belongs to one."""
    entries = np.concatenate([[0.0], _positive_entries(signed), [1.0]])
    midpoints: np.ndarray = (entries[:-1] + entries[1:]) / 2
    if not signed:
        midpoints[0] *= -1  # everything above zero is well above it
    return midpoints


def _lines(midpoints: np.ndarray) -> list[tuple[float, float]]:
    """Slopes and starts of the lines whose minimum at `midpoints[i]` is `i + 1`, the steepest first."""
    slopes = 1 / np.diff(midpoints)
    starts = np.arange(1, len(midpoints)) - slopes * midpoints[:-1]
    changes = np.flatnonzero(np.diff(slopes, prepend=np.inf) < -1e-9 * slopes)
    return [(float(slopes[i]), float(starts[i])) for i in changes]


def _decoded(graph: ir.Graph, codes: ir.Value, absmax: ir.Value, signed: bool) -> ir.Value:
    """Values float32 `[blocks, 256]`."""
    index = append(graph, "Cast", [codes], {"to": _INT32}, shape=["n"], dtype=_INT32)
    book = initializer(graph, "signed_book" if signed else "unsigned_book", dynamic_map(signed=signed))
    scaled = _blocks(graph, append(graph, "Gather", [book, index], shape=["n"]))
    column = initializer(graph, "shape_column", np.array([-1, 1], np.int64))
    scales = append(graph, "Reshape", [absmax, column], shape=["blocks", 1])
    return append(graph, "Mul", [scaled, scales], shape=scaled.shape)


def _encoded(graph: ir.Graph, values: ir.Value, signed: bool) -> tuple[ir.Value, ir.Value]:
    """Codes uint8 `[blocks, 256]` and the blocks' largest magnitudes float32 `[blocks, 1]`."""
    shape = values.shape

    def vector(op_type: str, *inputs: ir.Value) -> ir.Value:
        return append(graph, op_type, inputs, shape=shape)

    def number(value: float) -> ir.Value:
        return initializer(graph, f"number_{value!r}", np.array(value, np.float32))

    axis = initializer(graph, "axis", np.array([1], np.int64))
    absmax = append(graph, "ReduceMax", [vector("Abs", values), axis], {"keepdims": 1}, shape=["blocks", 1])
    divisor = append(graph, "Max", [absmax, number(_TINY)], shape=["blocks", 1])
    scaled = vector("Div", values, divisor)
    magnitude = vector("Abs", scaled)
    # min(r, a m + b) = a min((r - b) / a, m) + b: nested like this, one line at a time is in memory, where
    # onnxruntime would compute all of them first.
    midpoints = _midpoints(signed)
    lines = _lines(midpoints[:-1])
    lowest = magnitude
    for (steeper, before), (slope, start) in itertools.pairwise(lines):
        lowest = vector("Mul", lowest, number(steeper / slope))
        lowest = vector("Min", vector("Add", lowest, number((before - start) / slope)), magnitude)
    slope, start = lines[-1]
    rank = vector("Floor", vector("Add", vector("Mul", lowest, number(slope)), number(start)))
    # One is nearer to the entry below it than that one's neighbours are: the curve bends upwards there.
    last = number(float(midpoints[-1]))
    is_one = append(graph, "Greater", [magnitude, last], shape=shape, dtype=ir.DataType.BOOL)
    rank = vector("Add", rank, append(graph, "Cast", [is_one], {"to": FLOAT}, shape=shape))
    code = vector("Mul", rank, vector("Sign", scaled))
    if signed:
        code = vector("Add", code, number(127.0))
    # There is no code for -1, one may be counted twice, and what is no number must not leave the book either.
    limits = [initializer(graph, f"int_{limit}", np.array(limit, np.int32)) for limit in (0, 255)]
    whole = append(graph, "Cast", [code], {"to": _INT32}, shape=shape, dtype=_INT32)
    whole = append(graph, "Clip", [whole, *limits], shape=shape, dtype=_INT32)
    return append(graph, "Cast", [whole], {"to": _UINT8}, shape=shape, dtype=_UINT8), absmax


def _blocks(graph: ir.Graph, value: ir.Value) -> ir.Value:
    shape = initializer(graph, "shape_blocks", np.array([-1, _BLOCK], np.int64))
    return append(graph, "Reshape", [value, shape], shape=["blocks", _BLOCK])


def _flat(graph: ir.Graph, value: ir.Value, axis: str) -> ir.Value:
    shape = initializer(graph, "shape_flat", np.array([-1], np.int64))
    return append(graph, "Reshape", [value, shape], shape=[axis], dtype=value.dtype)
