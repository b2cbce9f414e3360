"""Put linear layers that read the same value side by side: one product instead of two or three.

Before: `x @ Wqᵀ`, `x @ Wkᵀ`, `x @ Wvᵀ` (each with a bias, or none). After: `Split(x @ [Wq; Wk; Wv]ᵀ)`. The
rows of the weights stand one after the other, so that other graphs go on reading their parts of the same
bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from ...graph import append, graph_input, initializer

Weights = dict[str, tuple[ir.Value, torch.Tensor]]


@dataclass
class SideBySide:
    """What was put together.

    Attributes:
        places: where the results of each product that is gone are now.
        parts: names of the weights that each new weight is made of.
    """

    places: dict[ir.Node, "Place"] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The columns of `output` from `first` on are a layer's results, bias included; `x` is what it reads."""

    x: ir.Value
    output: ir.Value
    first: int


@dataclass(frozen=True)
class _Member:
    """`y = x @ Wᵀ (+ bias)`; `output` is y."""

    product: ir.Node
    weight: str
    bias: str | None
    output: ir.Value


def put_side_by_side(
    graph: ir.Graph, weights: Weights, can_join: Callable[[Sequence[str]], bool]
) -> SideBySide:
    """Join the products `MatMul(x, Transpose(W))` that share `x`; the caller sorts and tidies.

    Args:
        weights: the graph's weight inputs by name, with their values; the joined ones are added.
        can_join: whether weights of these names are stored alike.
    """
    done = SideBySide()
    groups: dict[ir.Value, list[list[_Member]]] = {}
    for node in graph:
        member = _member(node, weights)
        if member is None:
            continue
        alike = groups.setdefault(node.inputs[0], [])  # type: ignore[arg-type]
        group = next((group for group in alike if can_join([group[0].weight, member.weight])), None)
        if group is None:
            alike.append([member])
        else:
            group.append(member)
    for x, alike in groups.items():
        for members in alike:
            if len(members) > 1:
                _join(graph, x, members, weights, done)
    return done


def _member(node: ir.Node, weights: Weights) -> _Member | None:
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    turned = node.inputs[1].producer()
    weight = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else None
    if (
        weight is None
        or weight.name not in weights
        or len(weight.uses()) != 1
        or len(node.inputs[1].uses()) != 1
    ):
        return None
    output, bias = node.outputs[0], None
    readers = [reader for reader, _ in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Add" and not output.is_graph_output():
        other = next((value for value in readers[0].inputs if value is not output), None)
        if other is not None and other.name in weights and other.shape is not None and len(other.shape) == 1:
            output, bias = readers[0].outputs[0], other.name
    return None if output.is_graph_output() else _Member(node, weight.name, bias, output)


def _join(
    graph: ir.Graph, x: ir.Value, members: Sequence[_Member], weights: Weights, done: SideBySide
) -> None:
    if len({member.bias is None for member in members}) != 1:
        return
    widths = [_width(member.output) for member in members]
    assert x.shape is not None
    lead, total = list(x.shape)[:-1], sum(widths)
    weight = _joined(graph, [member.weight for member in members], weights, done.parts)
    assert weight.shape is not None
    turned = append(graph, "Transpose", [weight], {"perm": [1, 0]}, shape=[weight.shape[1], total])
    output = append(graph, "MatMul", [x, turned], shape=[*lead, total])
    biases = [member.bias for member in members if member.bias is not None]
    if biases:
        output = append(
            graph, "Add", [output, _joined(graph, biases, weights, done.parts)], shape=[*lead, total]
        )
    sizes = initializer(graph, "split_" + "_".join(map(str, widths)), np.array(widths, np.int64))
    parts = [ir.Value(shape=ir.Shape([*lead, width]), type=x.type) for width in widths]
    graph.append(ir.node("Split", [output, sizes], {"axis": -1}, outputs=parts))
    for member, part in zip(members, parts, strict=True):
        member.output.replace_all_uses_with(part)
    packed = _pack_attention(output, parts)
    first = 0
    for member, part, width in zip(members, parts, widths, strict=True):
        done.places[member.product] = Place(x, output, first) if packed else Place(x, part, 0)
        first += width


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    width = value.shape[-1]
    assert isinstance(width, int)
    return width


def _joined(
    graph: ir.Graph, names: Sequence[str], weights: Weights, parts: dict[str, tuple[str, ...]]
) -> ir.Value:
    """The input that holds these weights, one below the other, named after all of them."""
    modules = [name.rpartition(".")[0] for name in names]
    suffix = names[0].rpartition(".")[2]
    parent = modules[0].rpartition(".")[0]
    last = "+".join(module.rpartition(".")[2] for module in modules)
    name = f"{parent}.{last}.{suffix}" if parent else f"{last}.{suffix}"
    # Its values are made of what is stored of the parts.
    tensor = torch.cat([weights[part][1].to("meta") for part in names])
    value = graph_input(graph, name, list(tensor.shape))
    weights[name] = value, tensor
    parts[name] = tuple(names)
    return value


def _pack_attention(output: ir.Value, parts: Sequence[ir.Value]) -> bool:
    """Hand queries, keys and values over in one, where attention reads just these."""
    readers = {reader for part in parts for reader, _ in part.uses()}
    if len(readers) != 1 or len(parts) != 3:
        return False
    (reader,) = readers
    if reader.op_type != "GroupQueryAttention" or list(reader.inputs[:3]) != list(parts):
        return False
    reader.replace_input_with(0, output)
    reader.replace_input_with(1, None)
    reader.replace_input_with(2, None)
    return True
