"""What a gradient rule sees of the node it differentiates."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgepeft.errors import ExportError

from .emitter import Emitter


class RuleContext:
    """A node, the cotangents of its outputs, and which cotangents of its inputs are wanted.

    Attributes:
        emit: emits nodes into the graph.
        node: the node of the forward pass.
        cotangents: one per output; None stands for zero. At least one is not None.
        wanted: one per input; a rule emits nothing for inputs that are not wanted.
    """

    def __init__(
        self,
        emit: Emitter,
        node: ir.Node,
        cotangents: Sequence[ir.Value | None],
        wanted: tuple[bool, ...],
    ) -> None:
        self.emit = emit
        self.node = node
        self.cotangents = cotangents
        self.wanted = wanted

    @property
    def cotangent(self) -> ir.Value:
        """The cotangent of the first output.

        Raises:
            ExportError: when only another output influences the loss.
        """
        cotangent = self.cotangents[0]
        if cotangent is None:
            raise ExportError(
                f"{self.node.op_type} node {self.node.name!r} influences the loss through an output other "
                "than its first, which has no gradient rule"
            )
        return cotangent

    @property
    def output(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]

    def input(self, index: int) -> ir.Value:
        """An input that the operator requires.

        Raises:
            ExportError: when it is absent.
        """
        value = self.optional_input(index)
        if value is None:
            raise ExportError(f"{self.node.op_type} node {self.node.name!r} has no input {index}")
        return value

    def optional_input(self, index: int) -> ir.Value | None:
        """An input, or None where it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def wants(self, index: int) -> bool:
        """Whether the cotangent of an input is wanted."""
        return index < len(self.wanted) and self.wanted[index]

    def attr_int(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def attr_ints(self, name: str) -> tuple[int, ...] | None:
        """An integer-list attribute, or None where it is absent."""
        attribute = self.node.attributes.get(name)
        return None if attribute is None else tuple(attribute.as_ints())

    def attr_float(self, name: str, default: float) -> float:
        """A floating-point attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_float()

    def attr_str(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()
