"""Have a classifier pick its token before the last linear layer, and not out of what that makes of all.

transformers' language models with a classifier score every token and take the last one's scores. Taken first,
it is one product a row, and the layer is a linear head like any other (see `linear_head`).
"""

import onnx_ir as ir

from ..graph import append, take_place


def pool_before_head(graph: ir.Graph) -> None:
    """Rewrite `GatherND(MatMul(hidden, weight), indices)`, the graph's output, as
    `MatMul(GatherND(hidden, indices), weight)`; leave every other graph as it is.

    `hidden` is `[batch, sequence, width]`, `indices` are `[batch, 2]`: a row's token.
    """
    output = graph.outputs[0]
    pick = output.producer()
    scores = pick.inputs[0] if pick is not None and pick.op_type == "GatherND" else None
    product = None if scores is None else scores.producer()
    if pick is None or scores is None or product is None or product.op_type != "MatMul":
        return
    (hidden, weight), indices = product.inputs, pick.inputs[1]
    if hidden is None or hidden.shape is None or indices is None or indices.shape is None:
        return
    whole_tokens = len(hidden.shape) == 3 and indices.shape[-1] == 2
    if not whole_tokens or pick.attributes.get_int("batch_dims", 0) != 0 or len(scores.uses()) != 1:
        return
    shape = [indices.shape[0], hidden.shape[2]]
    picked = append(graph, "GatherND", [hidden, indices], shape=shape, dtype=hidden.dtype)
    take_place(append(graph, "MatMul", [picked, weight], shape=output.shape, dtype=output.dtype), output)
