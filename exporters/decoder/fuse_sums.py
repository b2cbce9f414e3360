"""Let products and normalizations do the sums around them: every node that a token passes takes time.

x @ W + b             → MatMulNBits with a bias
r + (y + t @ B)       → y + Gemm(t, B, r)
y + t @ B             → Gemm(t, B, y)
norm(a + b)           → SkipSimplifiedLayerNormalization(a, b)
x * sigmoid(x)        → QuickGelu(x)
"""

import onnx_ir as ir

from ..graph import FLOAT, MICROSOFT, append, take_place
from ..quantize.products import BIAS


def fuse_sums(graph: ir.Graph) -> None:
    """Rewrite a sorted graph; a `Gemm` needs tokens `[tokens, width]`. The caller sorts and tidies."""
    for node in list(graph):
        if node.op_type == "Add" and not node.domain:
            _fuse_bias(node)
    for node in list(graph):
        if node.op_type == "Add" and not node.domain:
            _fuse_product(graph, node)
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _fuse_skip(graph, node)
        elif node.op_type == "Mul":
            _fuse_silu(graph, node)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _fuse_bias(node: ir.Node) -> None:
    for value, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        product = value.producer() if value is not None else None
        if (
            product is None
            or product.op_type != "MatMulNBits"
            or _only_reader(product.outputs[0]) is not node
        ):
            continue
        if other is None or other.const_value is None or other.shape is None or len(other.shape) != 1:
            continue
        if other.shape[0] != product.attributes["N"].as_int():
            continue
        if len(product.inputs) <= BIAS:
            product.resize_inputs(BIAS + 1)
        if product.inputs[BIAS] is not None:
            continue
        product.replace_input_with(BIAS, other)
        take_place(product.outputs[0], node.outputs[0])
        return


def _fuse_product(graph: ir.Graph, node: ir.Node) -> None:
    for delta, y in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        product = delta.producer() if delta is not None else None
        if product is None or product.op_type != "MatMul" or y is None or not _is_matrix(y):
            continue
        t, factor = product.inputs
        assert delta is not None
        if (
            t is None
            or factor is None
            or not (_is_matrix(t) and _is_matrix(factor))
            or len(delta.uses()) != 1
        ):
            continue
        total = node.outputs[0]
        reader = _only_reader(total)
        residual = None
        if reader is not None and reader.op_type == "Add":
            residual = next((value for value in reader.inputs if value is not total), None)
        if residual is not None and residual.shape == y.shape:
            moved = append(graph, "Gemm", [t, factor, residual], shape=y.shape)
            assert reader is not None
            position = next(index for index, value in enumerate(reader.inputs) if value is residual)
            reader.replace_input_with(position, moved)
            reader.replace_input_with(1 - position, y)
        else:
            take_place(append(graph, "Gemm", [t, factor, y], shape=y.shape), total)
        return


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2


def _fuse_skip(graph: ir.Graph, node: ir.Node) -> None:
    summed, scale = node.inputs[:2]
    add = summed.producer() if summed is not None else None
    if summed is None or add is None or add.op_type != "Add" or summed.is_graph_output():
        return
    a, b = add.inputs
    if a is None or b is None or a.shape is None or a.shape != b.shape or scale is None:
        return
    axes = len(a.shape)
    last = node.attributes.get_int("axis", -1) in (-1, axes - 1)
    if node.attributes.get_int("stash_type", 1) != 1 or not last or axes not in (2, 3):
        return
    outputs = [ir.Value(shape=summed.shape, type=ir.TensorType(FLOAT)) for _ in range(4)]
    outputs[1].name = outputs[2].name = ""
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    graph.append(
        ir.node(
            "SkipSimplifiedLayerNormalization",
            [a, b, scale],
            {"epsilon": epsilon},
            domain=MICROSOFT,
            outputs=outputs,
        )
    )
    node.outputs[0].replace_all_uses_with(outputs[0])
    summed.replace_all_uses_with(outputs[3])


def _fuse_silu(graph: ir.Graph, node: ir.Node) -> None:
    for x, gate in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        sigmoid = gate.producer() if gate is not None else None
        if x is None or sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not x:
            continue
        silu = append(graph, "QuickGelu", [x], {"alpha": 1.0}, shape=x.shape, domain=MICROSOFT)
        take_place(silu, node.outputs[0])
        return
