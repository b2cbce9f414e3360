"""Turn the weights of an imported graph into inputs, named by their modules, as a traced graph has them.

Before: a product by an initializer (`MatMul`, `Gemm`), or by a quantized one (`MatMulNBits`,
`DequantizeLinear → MatMul`); a look-up in an initializer (`Gather`). After: the float matrices are graph
inputs `MODULE.weight` `[out_features, in_features]`, so that no later optimization folds or merges them; the
products with quantized weights are marked with their module, and their bytes are what they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from ...graph import MICROSOFT, transposed_input
from .linears import is_plain_gemm, mark_linear

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Weights:
    """The weights of a graph and the nodes that read them.

    Attributes:
        products: matrices among the initializers by which a node multiplies, float or quantized.
        lookups: matrices among the initializers of which a node gathers rows.
    """

    products: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)
    lookups: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)

    @property
    def named(self) -> list[tuple[ir.Value, Sequence[ir.Node]]]:
        """Every weight with its nodes; one that is multiplied by and looked up is named by its look-up."""
        tables = {weight: nodes for weight, nodes in self.lookups.items() if weight.const_value is not None}
        return [*tables.items(), *(item for item in self.products.items() if item[0] not in tables)]


def find_weights(graph: ir.Graph) -> Weights:
    """The products with, and the look-ups in, initializers of `graph`."""
    found = Weights()
    for node in graph:
        if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            table = node.inputs[0]
            if table is not None and _is_matrix(table):
                found.lookups.setdefault(table, []).append(node)
        weight = _multiplied(node)
        if weight is not None:
            found.products.setdefault(weight, []).append(node)
    return found


def lift_weights(graph: ir.Graph, weights: Weights, names: dict[ir.Value, str]) -> dict[str, torch.Tensor]:
    """Make the float weights inputs and mark the quantized products.

    Args:
        names: the module of each weight.

    Returns:
        The values of the new inputs, by name.
    """
    lifted: dict[str, torch.Tensor] = {}
    for weight, _ in weights.named:
        module = names[weight]
        nodes = weights.products.get(weight, [])
        if not _is_matrix(weight):
            for node in nodes:
                mark_linear(node, module)
            continue
        turned = weight not in weights.lookups and any(_reads_turned(node, weight) for node in nodes)
        tensor = to_torch(weight)
        value = lift(graph, weight, f"{module}.weight")
        if turned:
            tensor = tensor.T.contiguous()
            graph.inputs.remove(value)
            value = transposed_input(graph, value)
            graph.inputs.append(value)
        lifted[f"{module}.weight"] = tensor
    return lifted


def lift(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Make an initializer the graph input `name`."""
    assert value.name is not None
    assert value.const_value is not None
    del graph.initializers[value.name]
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(value.const_value.shape.numpy())
    value.const_value = None
    value.name = name
    graph.inputs.append(value)
    return value


def to_torch(value: ir.Value) -> torch.Tensor:
    """The values of an initializer, float32."""
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().astype("float32"))


def _multiplied(node: ir.Node) -> ir.Value | None:
    """The initializer by which `node` multiplies its first input."""
    if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
        return node.inputs[1]
    if node.op_type == "MatMulBnb4" and node.domain == MICROSOFT:
        return node.inputs[1]
    plain = is_plain_gemm(node, trans_b=0) or is_plain_gemm(node, trans_b=1)
    if node.domain or not (node.op_type == "MatMul" or plain):
        return None
    weight = node.inputs[1]
    if weight is None or node.inputs[0] is None or node.inputs[0].const_value is not None:
        return None
    producer = weight.producer()
    if producer is not None and _is_turning(producer):
        weight = producer.inputs[0]
        producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        codes = producer.inputs[0]
        return codes if codes is not None and codes.const_value is not None else None
    return weight if weight is not None and _is_matrix(weight) else None


def _is_turning(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [1, 0]


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype in _FLOATS


def _reads_turned(node: ir.Node, weight: ir.Value) -> bool:
    """Whether `node` reads `weight` as `[in_features, out_features]`."""
    return node.inputs[1] is weight and not is_plain_gemm(node, trans_b=1)
