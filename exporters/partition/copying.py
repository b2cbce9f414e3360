"""Copy nodes of a graph into a new one."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import digest, initializer


class Copier:
    """A new graph that nodes are copied into.

    Attributes:
        values: the copy of each value that the new graph has.
    """

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], name=name)
        self.values: dict[ir.Value, ir.Value] = {}

    def add_input(self, value: ir.Value, name: str, shape: ir.Shape | None = None) -> ir.Value:
        """Take `value` as an input called `name`."""
        copied = ir.Value(name=name, shape=(shape or value.shape), type=value.type)
        self.graph.inputs.append(copied)
        self.values[value] = copied
        return copied

    def copy(self, node: ir.Node) -> None:
        """Append a copy of `node`, whose operands are in the new graph or are constants."""
        for value in node.inputs:
            if value is not None:
                self._add_constant(value)
        self.graph.append(copied_node(node, self.values))

    def _add_constant(self, value: ir.Value) -> None:
        if value not in self.values:
            tensor = value.const_value
            assert tensor is not None, f"{value.name} is neither copied nor a constant"
            # All graphs of a bundle keep their large constants in one file, by name.
            self.values[value] = initializer(
                self.graph, f"constant_{digest(tensor)}", ir.tensor(tensor.numpy())
            )


def copied_node(node: ir.Node, values: dict[ir.Value, ir.Value]) -> ir.Node:
    """A copy of `node` that reads of `values` what is there; its outputs are added to them."""
    operands = [None if value is None else values.get(value, value) for value in node.inputs]
    # The graph names the outputs: names of the old one could meet names that it gives itself.
    outputs = [ir.Value(shape=value.shape, type=value.type) for value in node.outputs]
    copied = ir.Node(node.domain, node.op_type, operands, node.attributes.values(), outputs=outputs)
    copied.metadata_props.update(node.metadata_props)
    values.update(zip(node.outputs, outputs, strict=True))
    return copied
