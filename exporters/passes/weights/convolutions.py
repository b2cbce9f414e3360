"""Find the convolutions of a graph by the names of their weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Convolution:
    """`output = conv(x, W)` with `weight` float32 `[out_channels, in_channels, *kernel]`, not in groups."""

    module: str
    nodes: tuple[ir.Node, ...]
    weight: ir.Value


def find_convolutions(weights: Iterable[ir.Value]) -> dict[str, Convolution]:
    """The convolutions whose weight is one of `weights`, by module name."""
    found = {}
    for weight in weights:
        name = weight.name or ""
        nodes = tuple(node for node, index in weight.uses() if node.op_type == "Conv" and index == 1)
        if name.endswith(".weight") and nodes and all(_is_plain(node) for node in nodes):
            module = name.removesuffix(".weight")
            found[module] = Convolution(module, nodes, weight)
    return found


def _is_plain(node: ir.Node) -> bool:
    """Whether the kernel is dense: neither in groups nor dilated."""
    dilations = node.attributes.get_ints("dilations", [])
    return node.attributes.get_int("group", 1) == 1 and set(dilations) <= {1}
