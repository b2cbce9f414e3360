"""Find the linear layers and embeddings of a graph by the names of their weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.errors import ExportError


@dataclass(frozen=True)
class Linear:
    """`output = x @ W.T (+ bias)`: a `MatMul` by a transposed weight, or a `Gemm` with `transB`.

    `weight` is float32 `[out_features, in_features]`, as `torch.nn.Linear` keeps it.
    """

    module: str
    node: ir.Node
    x: ir.Value
    weight: ir.Value
    in_features: int
    out_features: int

    @property
    def output(self) -> ir.Value:
        """The value the layer computes, `[…, out_features]`; a `MatMul`'s bias is added after it."""
        return self.node.outputs[0]


@dataclass(frozen=True)
class Embedding:
    """`output = W[ids]` with `weight` float32 `[num_embeddings, embedding_dim]`."""

    module: str
    node: ir.Node
    weight: ir.Value


def find_linears(weights: Iterable[ir.Value]) -> dict[str, Linear]:
    """The linear layers that read one of `weights`, by module name.

    A weight shared by several nodes (tied, or applied twice) appears once, under its first use.
    """
    found: dict[str, Linear] = {}
    for weight in weights:
        module = _module_name(weight)
        if module is None:
            continue
        for node, x in _products(weight):
            assert weight.shape is not None
            out_features, in_features = (int(dim) for dim in weight.shape)  # type: ignore[arg-type]
            found.setdefault(module, Linear(module, node, x, weight, in_features, out_features))
    return found


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


def select(linears: dict[str, Linear], targets: Iterable[str]) -> dict[str, Linear]:
    """The linears whose module name is one of `targets` or ends with `.target` (PEFT's `target_modules`).

    Raises:
        ExportError: a target matches no linear.
    """
    chosen: dict[str, Linear] = {}
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


def _products(weight: ir.Value) -> Iterable[tuple[ir.Node, ir.Value]]:
    for node, index in weight.uses():
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]:
            for product, operand in node.outputs[0].uses():
                if product.op_type == "MatMul" and operand == 1:
                    x = product.inputs[0]
                    assert x is not None
                    yield product, x
        elif node.op_type == "Gemm" and index == 1 and node.attributes.get_int("transB", 0) == 1:
            plain = (
                node.attributes.get_int("transA", 0) == 0 and node.attributes.get_float("alpha", 1.0) == 1.0
            )
            x = node.inputs[0]
            if plain and x is not None:
                yield node, x


def _module_name(weight: ir.Value) -> str | None:
    name = weight.name or ""
    two_dimensional = weight.shape is not None and len(weight.shape) == 2
    return name.removesuffix(".weight") if name.endswith(".weight") and two_dimensional else None
