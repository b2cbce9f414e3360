"""Find the linear layers and embeddings of a graph by the names of their weights."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import onnx_ir as ir

from edgepeft.errors import ExportError

_MARK = "edgepeft.linear"
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Linear:
    """`output = x @ W.T (+ bias)`: every node that computes it, several where layers share their weights.

    A node's first input is `x` `[…, in_features]`, its output is `[…, out_features]`, or, where several
    layers are packed in one product, that from column `first` on; a `MatMul`'s bias is added after it.
    """

    module: str
    nodes: tuple[ir.Node, ...]
    in_features: int
    out_features: int
    first: int = 0

    @property
    def uses(self) -> list[tuple[ir.Node, ir.Value]]:
        """The nodes, each with the `x` that it has now."""
        return [(node, x) for node in self.nodes if (x := node.inputs[0]) is not None]


@dataclass(frozen=True)
class Embedding:
    """`output = W[ids]` with `weight` float32 `[num_embeddings, embedding_dim]`."""

    module: str
    node: ir.Node
    weight: ir.Value


def find_linears(weights: Iterable[ir.Value]) -> dict[str, Linear]:
    """The linear layers whose weight is one of `weights`, by module name."""
    found: dict[str, Linear] = {}
    for weight in weights:
        module = _module_name(weight)
        if module is not None and linear_products(weight):
            assert weight.shape is not None
            out_features, in_features = weight.shape.numpy()
            nodes = tuple(node for node, _ in linear_products(weight))
            found[module] = Linear(module, nodes, in_features, out_features)
    return found


def unpack(linears: dict[str, Linear], packed: Mapping[str, Mapping[str, int]]) -> dict[str, Linear]:
    """`linears` with each of `packed` replaced by its parts, whose widths follow each other in its output."""
    found: dict[str, Linear] = {}
    for module, linear in linears.items():
        first = 0
        for part, width in packed.get(module, {module: linear.out_features}).items():
            found[part] = replace(linear, module=part, out_features=width, first=first)
            first += width
    return found


def mark_linear(node: ir.Node, module: str) -> None:
    """Note on a product with a frozen, quantized weight which module it is."""
    node.metadata_props[_MARK] = module


def find_marked_linears(graph: ir.Graph) -> dict[str, Linear]:
    """The linear layers that `mark_linear` noted, by module name."""
    nodes: dict[str, list[ir.Node]] = {}
    for node in graph:
        if _MARK in node.metadata_props:
            nodes.setdefault(node.metadata_props[_MARK], []).append(node)
    return {module: _marked(module, tuple(products)) for module, products in nodes.items()}


def _marked(module: str, nodes: tuple[ir.Node, ...]) -> Linear:
    node = nodes[0]
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        attributes = node.attributes
        return Linear(module, nodes, attributes["K"].as_int(), attributes["N"].as_int())
    x, y = node.inputs[0], node.outputs[0]
    sizes = [value.shape[-1] if value is not None and value.shape is not None else None for value in (x, y)]
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        raise ExportError(f"linear {module}: its sizes are not static, got {sizes[0]} -> {sizes[1]}")
    return Linear(module, nodes, sizes[0], sizes[1])


def find_embeddings(weights: Iterable[ir.Value]) -> list[Embedding]:
    """The `Gather` nodes that look rows of one of `weights` up."""
    return [
        Embedding(module, node, weight)
        for weight in weights
        if (module := _module_name(weight)) is not None
        for node, index in weight.uses()
        if node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0
    ]


def linear_products(weight: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """Every node that multiplies by `weight` transposed, with its other operand."""
    return list(_products(weight))


def select(linears: Mapping[str, _Found], targets: Iterable[str]) -> dict[str, _Found]:
    """The linears whose module name is one of `targets` or ends with `.target` (PEFT's `target_modules`).

    Raises:
        ExportError: a target matches no linear.
    """
    chosen: dict[str, _Found] = {}
    for target in targets:
        matching = {
            name: linear for name, linear in linears.items() if name == target or name.endswith(f".{target}")
        }
        if not matching:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ExportError(
                f"target module {target!r} is not a linear of this model: it has {', '.join(kinds)}"
            )
        chosen.update(matching)
    return {name: linear for name, linear in linears.items() if name in chosen}


def with_bias(product: ir.Node) -> ir.Value:
    """The product, or its sum with a vector where that is all that it is read for."""
    output = product.outputs[0]
    readers = [reader for reader, _ in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Add" and not output.is_graph_output():
        other = next((value for value in readers[0].inputs if value is not output), None)
        if other is not None and other.shape is not None and len(other.shape) == 1:
            return readers[0].outputs[0]
    return output


def _products(weight: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node, index in weight.uses():
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]:
            for product, operand in node.outputs[0].uses():
                if operand == 1 and (product.op_type == "MatMul" or is_plain_gemm(product, trans_b=0)):
                    x = product.inputs[0]
                    assert x is not None
                    yield product, x
        elif index == 1 and is_plain_gemm(node, trans_b=1):
            x = node.inputs[0]
            assert x is not None
            yield node, x


def is_plain_gemm(node: ir.Node, *, trans_b: int) -> bool:
    """Whether `node` is `x @ B (+ C)` or, with `trans_b`, `x @ B.T (+ C)`."""
    attributes = node.attributes
    return (
        node.op_type == "Gemm"
        and attributes.get_int("transB", 0) == trans_b
        and attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
    )


def _module_name(weight: ir.Value) -> str | None:
    name = weight.name or ""
    two_dimensional = weight.shape is not None and len(weight.shape) == 2
    return name.removesuffix(".weight") if name.endswith(".weight") and two_dimensional else None
