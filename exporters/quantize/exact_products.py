"""Make quantized products smooth functions of their activations, for a graph that is differentiated.

With `accuracy_level` 4 a `MatMulNBits` rounds its activations to int8 before it multiplies: the loss becomes
a staircase, whose steps the gradient of the exact product does not see.
"""

import onnx_ir as ir


def use_exact_products(graph: ir.Graph) -> int:
    """Take `accuracy_level` off every `MatMulNBits` that has one; returns how many had."""
    changed = 0
    for node in graph:
        if node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) > 0:
            del node.attributes["accuracy_level"]
            changed += 1
    return changed
