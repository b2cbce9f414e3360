"""Find the linear layers and embeddings of a graph by the names of their weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.errors import ExportError


@dataclass(frozen=True)
class Linear:
    """`output = x @ W.T (+ bias)`: a `MatMul` by a transposed weight, or a `Gemm` with `transB`.

    `weight` is float32 `[out_features, in_features]`, as `torch.nn.Linear` keeps it.
    """

    module: str
    weight: ir.Value
    in_features: int
    out_features: int

    @property
    def uses(self) -> list[tuple[ir.Node, ir.Value]]:
        """The nodes that compute the layer, each with its `x`: several where layers share their weights.

        A node's output is `[…, out_features]`; a `MatMul`'s bias is added after it.
        """
        return linear_products(self.weight)


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
            found[module] = Linear(module, weight, in_features, out_features)
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


def _products(weight: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node, index in weight.uses():
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]:
            for product, operand in node.outputs[0].uses():
                if operand == 1 and (product.op_type == "MatMul" or _is_plain_gemm(product, trans_b=0)):
                    x = product.inputs[0]
                    assert x is not None
                    yield product, x
        elif index == 1 and _is_plain_gemm(node, trans_b=1):
            x = node.inputs[0]
            assert x is not None
            yield node, x


def _is_plain_gemm(node: ir.Node, *, trans_b: int) -> bool:
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
