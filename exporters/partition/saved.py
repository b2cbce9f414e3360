"""What a backward pass keeps of its forward pass, and what it computes again.

Normalizations, activations, rotations and the decoding of weights may be computed again, products and
attention may not. Source: the minimum cut of PyTorch's `torch._functorch.partitioners`
(https://dev-discuss.pytorch.org/t/467), of which this is the part that trades nothing dear for memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import networkx
import onnx_ir as ir

from edgepeft.slots import SIZE_AXIS

from ..graph import MICROSOFT
from .cuts import ancestors

# Elementwise, a view, or one pass over rows; each output value costs a few operations.
_CHEAP = {
    "": """Abs Add And Cast CastLike Clip Concat Constant ConstantOfShape Div Elu Equal Erf Exp Expand Flatten
        Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity LayerNormalization LeakyRelu Less
        LessOrEqual Log Max Min Mish Mul Neg Not Or Pow RMSNormalization Range Reciprocal ReduceMax ReduceMean
        ReduceSum Relu Reshape RotaryEmbedding Selu Shape Sigmoid Sign SimplifiedLayerNormalization Slice
        Softplus Softsign Split Sqrt Squeeze Sub Swish Tanh Transpose Unsqueeze Where""",
    MICROSOFT: "BiasGelu FastGelu GatherBlockQuantized Gelu QuickGelu",
}
CHEAP = frozenset((domain, op_type) for domain, names in _CHEAP.items() for op_type in names.split())


@dataclass(frozen=True)
class Saved:
    """Values of the forward pass that the backward pass is given, and nodes that it runs again, in order."""

    kept: tuple[ir.Value, ...]
    again: tuple[ir.Node, ...]


def choose_saved(graph: ir.Graph, forward: Collection[ir.Node]) -> Saved:
    """What the other nodes of `graph` need of the nodes `forward`; the graph is sorted.

    The fewest bytes from which cheap nodes make all that is needed are a minimum cut: every value is an edge
    of its size, and a cheap node joins what it reads to what it makes.
    """
    order = [node for node in graph if node in forward]
    wanted = {
        value
        for node in order
        for value in node.outputs
        if any(user not in forward for user, _ in value.uses())
    }
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    for node in order:
        cheap = (node.domain, node.op_type) in CHEAP
        for value in node.outputs:
            flow.add_edge((value, "made"), (value, "read"), capacity=_nominal_bytes(value))
            if value in wanted:
                flow.add_edge((value, "read"), "sink")
            if not cheap:
                flow.add_edge("source", (value, "made"))
                continue
            for operand in node.inputs:
                if operand is not None and operand.producer() in forward:
                    flow.add_edge((operand, "read"), (value, "made"))
    _, (made, _) = networkx.minimum_cut(flow, "source", "sink")
    kept = {
        value
        for node in order
        for value in node.outputs
        if (value, "made") in made and (value, "read") not in made
    }
    again = ancestors(wanted - kept, lambda value: value not in kept and value.producer() in forward)
    return Saved(
        tuple(value for node in order for value in node.outputs if value in kept),
        tuple(node for node in order if node in again),
    )


def _nominal_bytes(value: ir.Value) -> int:
    """The size of a value in a run of nominal size; one of unknown shape is taken to be large."""
    if value.shape is None:
        return 2**20
    dims = [dim if isinstance(dim, int) else _nominal_size(str(dim.value)) for dim in value.shape]
    return int(max(math.prod(dims), 1) * (1 if value.dtype is None else value.dtype.itemsize))


def _nominal_size(axis: str) -> int:
    return 8 if axis.startswith(SIZE_AXIS) else 1 if axis == "batch" else 128
