"""What other exporters call constants, and where they keep them."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

Rename = Callable[[int, onnx.TensorProto], str]


def as_initializers(model: onnx.ModelProto) -> None:
    """Constants of nodes as initializers of the same names, as optimizers of graphs leave them."""
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            array = numpy_helper.to_array(node.attribute[0].t)
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def as_nodes(model: onnx.ModelProto) -> None:
    """Initializers, weights among them, as `Constant` nodes."""
    nodes = [helper.make_node("Constant", [], [item.name], value=item) for item in model.graph.initializer]
    nodes += list(model.graph.node)
    del model.graph.initializer[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def renamed(rename: Rename) -> Callable[[onnx.ModelProto], None]:
    """All constants as initializers of other names."""

    def change(model: onnx.ModelProto) -> None:
        as_initializers(model)
        names = {item.name: rename(index, item) for index, item in enumerate(model.graph.initializer)}
        for item in model.graph.initializer:
            item.name = names[item.name]
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = names.get(name, name)

    return change


def _paddle(index: int, item: onnx.TensorProto) -> str:
    return f"linear_{index}.w_0" if np.prod(item.dims) > 1 else f"full_{index}.tmp_0"


def _ours(index: int, _item: onnx.TensorProto) -> str:
    """Names that the compiler gives values of its own."""
    taken = [
        "hidden",
        "context.0",
        "weight.0",
        "labels",
        "zero_float32",
        "axis_last",
        "one_float32",
        "columns",
    ]
    return taken[index] if index < len(taken) else f"constant_{index}"


#: By style, what it makes of a file of torch's.
STYLES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "initializers": as_initializers,
    "nodes": as_nodes,
    "keras": renamed(lambda index, _: f"StatefulPartitionedCall/model/layer_._{index % 3}/mul_{index}/y:0"),
    "tf2onnx": renamed(lambda index, _: f"const_fold_opt__{index}"),
    "paddle": renamed(_paddle),
    "dotted": renamed(lambda index, _: f"model.layers.{index}.weight"),
    "ours": renamed(_ours),
}
