"""Make one `Attention` of what Gemma 2 writes out, since PyTorch's own attention does not cap its scores.

Before: `MatMul(query, keysᵀ) · scale`, then `cap · Tanh(scores / cap)`, then `+ mask`, `Softmax` and
`MatMul(…, values)`. After: `Attention` (ai.onnx, version 23) with `scale` and `softcap`. It stands for a cap
before the mask, as in the model and in `GroupQueryAttention`, which `cache_in_place` makes of it. It is not
to be run: this version of the standard caps the masked scores.
"""

import onnx_ir as ir

from ...graph import append, constant_value
from .standard import producer, ungrouped

_LAST_TWO_SWAPPED = [0, 1, 3, 2]


def gather_capped_attention(graph: ir.Graph) -> int:
    """Rewrite every attention whose scores are capped; the caller sorts and tidies.

    Returns:
        How many were found.
    """
    found = 0
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        chain = _behind(softmax.inputs[0], "Add", "Mul", "Tanh", "Div", "Mul", "MatMul")
        readers = [reader for reader, _ in softmax.outputs[0].uses()]
        if chain is None or len(readers) != 1 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
            continue
        masked, uncap, _, cap, scaled, scores = chain
        scale, caps, product = _number(scaled), (_number(cap), _number(uncap)), readers[0]
        turned = producer(scores.inputs[1], "Transpose")
        if (
            scale is None
            or caps[0] is None
            or caps[0] != caps[1]
            or turned is None
            or list(turned.attributes["perm"].as_ints()) != _LAST_TWO_SWAPPED
            or product.op_type != "MatMul"
            or product.inputs[0] is not softmax.outputs[0]
        ):
            continue
        query, keys, values, mask = scores.inputs[0], turned.inputs[0], product.inputs[1], masked.inputs[1]
        parts = [query, ungrouped(keys) or keys, ungrouped(values) or values, mask]
        old = product.outputs[0]
        new = append(graph, "Attention", parts, {"scale": scale, "softcap": caps[0]}, shape=old.shape)
        old.replace_all_uses_with(new)
        found += 1
    return found


def _behind(value: ir.Value | None, *kinds: str) -> list[ir.Node] | None:
    """Nodes of these kinds, each making the first operand of the one before it; None where there are
    others."""
    chain = []
    for kind in kinds:
        node = producer(value, kind)
        if node is None:
            return None
        chain.append(node)
        value = node.inputs[0]
    return chain


def _number(node: ir.Node) -> float | None:
    """The second operand where it is one constant number."""
    value = constant_value(node.inputs[1])
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None
