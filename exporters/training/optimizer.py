"""The optimizer as graphs, so that a driver in any language stays a thin loop.

Both work on a flat vector of any length: a driver runs them over chunks of one buffer that holds all tensors.
"""

import numpy as np
import onnx_ir as ir

from ..graph import append, graph_input, initializer, new_model, tidy


def build_adamw() -> ir.Model:
    """One AdamW step on `param`, `grad`, `exp_avg`, `exp_avg_sq` float32 `[n]`.

        g = clip_coef * grad
        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g²
        p = p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    `step` is 1 at the first step; all scalars are float32 `[]`.
    Source: `torch.optim.AdamW` (arXiv 1711.05101).
    """
    graph = ir.Graph([], [], nodes=[], name="adamw")
    model = new_model(graph)
    vectors = [graph_input(graph, name, ["n"]) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    for value, name in zip(adamw_step(graph, *vectors), ("param", "exp_avg", "exp_avg_sq"), strict=True):
        value.name = f"{name}_out"
        graph.outputs.append(value)
    tidy(model)
    return model


def adamw_step(
    graph: ir.Graph, param: ir.Value, grad: ir.Value, exp_avg: ir.Value, exp_avg_sq: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append `build_adamw`'s arithmetic on tensors of one shape, and its scalars to the graph's inputs.

    Returns:
        What `param`, `exp_avg` and `exp_avg_sq` become.
    """
    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "clip_coef")
    lr, beta1, beta2, eps, weight_decay, step, clip_coef = (graph_input(graph, name, []) for name in names)
    one = initializer(graph, "one_float32", np.array(1, np.float32))

    def vector(op_type: str, *inputs: ir.Value) -> ir.Value:
        return append(graph, op_type, inputs, shape=param.shape)

    def scalar(op_type: str, *inputs: ir.Value) -> ir.Value:
        return append(graph, op_type, inputs, shape=[])

    clipped = vector("Mul", grad, clip_coef)
    first = vector("Add", vector("Mul", exp_avg, beta1), vector("Mul", clipped, scalar("Sub", one, beta1)))
    squared = vector("Mul", vector("Mul", clipped, clipped), scalar("Sub", one, beta2))
    second = vector("Add", vector("Mul", exp_avg_sq, beta2), squared)
    correction_1 = scalar("Sub", one, scalar("Pow", beta1, step))
    correction_2 = scalar("Sqrt", scalar("Sub", one, scalar("Pow", beta2, step)))
    denominator = vector("Add", vector("Div", vector("Sqrt", second), correction_2), eps)
    decayed = vector("Mul", param, scalar("Sub", one, scalar("Mul", lr, weight_decay)))
    update = vector("Div", vector("Mul", first, scalar("Div", lr, correction_1)), denominator)
    return vector("Sub", decayed, update), first, second


def build_grad_norm() -> ir.Model:
    """`sum_of_squares` float32 `[]` of `grad` float32 `[n]`; the global norm is the root of the sum over
    chunks."""
    graph = ir.Graph([], [], nodes=[], name="grad_norm")
    model = new_model(graph)
    grad = graph_input(graph, "grad", ["n"])
    axes = initializer(graph, "axes", np.array([0], np.int64))
    total = append(graph, "ReduceSumSquare", [grad, axes], {"keepdims": 0}, shape=[])
    total.name = "sum_of_squares"
    graph.outputs.append(total)
    tidy(model)
    return model
