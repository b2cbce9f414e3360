"""The training graph: forward, loss and the gradient of every adapter tensor, in ordinary operators."""

from dataclasses import dataclass

import onnx_ir as ir

from ..autodiff import differentiate
from ..forward import Forward
from ..graph import append, graph_input, new_model, tidy
from ..losses import Loss
from .rematerialize import rematerialize
from .sliced_loss import build_sliced_loss

GRADIENT_PREFIX = "grad."


@dataclass
class Joint:
    """A training graph: outputs `loss` and `grad.NAME` for every name of `trainable`."""

    model: ir.Model
    trainable: tuple[str, ...]


def build_joint(forward: Forward, loss: Loss) -> Joint:
    """Append loss and backward pass to a copy of `forward`.

    The gradient of an input has its layout (`A` `[in, rank]`, `B` `[rank, out]`). Inputs that do not reach
    the loss (a pooler that the task does not use) get none.

    Raises:
        UnsupportedOperatorError: an operator between an adapter and the loss has no gradient rule.
    """
    model = forward.model.clone()
    graph = model.graph
    output = next(value for value in graph.outputs if value.name == loss.output)
    sliced = build_sliced_loss(graph, loss, output)
    ends = [loss.build(graph, output)] if sliced is None else [sliced.loss, sliced.cotangent]
    graph.outputs[:] = ends
    tidy(model)
    names = [tensor.input for slot in forward.slots for tensor in slot.tensors if tensor.trains]
    inputs = {value.name: value for value in graph.inputs}
    trainable = [name for name in names if inputs[name].uses()]
    if sliced is None:
        cotangents = differentiate(graph, ends[0], [inputs[name] for name in trainable])
    else:
        cotangents = differentiate(
            graph, sliced.hidden, [inputs[name] for name in trainable], cotangent=sliced.cotangent
        )
    graph.outputs[:] = ends[:1]
    for name in trainable:
        gradient = cotangents[inputs[name]]
        if gradient.is_graph_output() or gradient.is_graph_input():
            gradient = append(graph, "Identity", [gradient], shape=inputs[name].shape)
        gradient.name = f"{GRADIENT_PREFIX}{name}"
        graph.outputs.append(gradient)
    tidy(model)
    rematerialize(model, ends)
    return Joint(model, tuple(trainable))


def build_loss(loss: Loss, output: ir.Value) -> ir.Model:
    """The loss alone, as a graph of `output` and the loss's own inputs: it evaluates what the inference graph
    computed."""
    graph = ir.Graph([], [], nodes=[], name="loss")
    model = new_model(graph)
    assert output.shape is not None
    value = graph_input(graph, loss.output, list(output.shape))
    graph.outputs.append(loss.build(graph, value))
    tidy(model)
    return model
