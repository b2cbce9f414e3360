"""Find the linear layer that makes a classifier's outputs, and what it reads: the features."""

from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.bundle.manifest import FEATURES, LABELS

from ...graph import append
from .linears import is_plain_gemm


@dataclass(frozen=True)
class Head:
    """`output = features @ weight.T (+ bias)`: `features` float32 `[…, width]`, and two graph inputs,
    `weight` `[outputs, width]` and `bias` `[outputs]`."""

    features: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def find_linear_head(output: ir.Value) -> Head | None:
    """The linear layer that makes `output`; None where it is made otherwise, or of frozen weights."""
    node = output.producer()
    bias = None
    if node is not None and node.op_type == "Add":
        product, bias = _product_and_bias(node)
        node = None if product is None else product.producer()
    if node is None or (bias is not None and not bias.is_graph_input()):
        return None
    features, weight = node.inputs[0], None
    if is_plain_gemm(node, trans_b=1):
        weight = node.inputs[1]
    elif is_plain_gemm(node, trans_b=0) or node.op_type == "MatMul":
        weight = _turned(node.inputs[1])
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        if bias is not None or not node.inputs[2].is_graph_input():
            return None
        bias = node.inputs[2]
    if features is None or weight is None or not weight.is_graph_input() or len(weight.uses()) != 1:
        return None
    return Head(features, weight, bias)


def free_labels(head: Head, output: ir.Value) -> None:
    """Let the head have any number of labels: its rows, its bias and what lies between them and the output
    have the axis `labels`."""
    between, waiting = [output], [head.weight]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.outputs[0] not in between:
                between.append(node.outputs[0])
                waiting.append(node.outputs[0])
    for value, axis in ((head.weight, 0), (head.bias, 0), *((value, -1) for value in between)):
        if value is not None and value.shape is not None:
            dims = list(value.shape)
            dims[axis] = ir.SymbolicDim(LABELS)
            value.shape = ir.Shape(dims)


def add_features(graph: ir.Graph, head: Head) -> None:
    """Have the graph put out what its last linear layer reads, under the name `features`."""
    features = head.features
    if features.is_graph_input() or features.is_graph_output():
        features = append(graph, "Identity", [features], shape=features.shape)
    features.name = FEATURES
    graph.outputs.append(features)


def _product_and_bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The operands of an addition, that of one axis last."""
    operands = [value for value in node.inputs if value is not None]
    biases = [value for value in operands if value.shape is not None and len(value.shape) == 1]
    others = [value for value in operands if value not in biases]
    return (others[0], biases[0]) if len(biases) == len(others) == 1 else (None, None)


def _turned(value: ir.Value | None) -> ir.Value | None:
    """What `value` is the transpose of."""
    node = None if value is None else value.producer()
    turns = node is not None and node.op_type == "Transpose"
    return node.inputs[0] if node is not None and turns else None
