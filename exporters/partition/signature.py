"""Which segments are the same computation: a canonical description of each, and the period of a chain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from ..graph import in_front
from .cuts import Segment


@dataclass(frozen=True)
class Signature:
    """A description that is equal for isomorphic pieces, and the outside values in its order.

    Two pieces with equal `text` compute the same function of `weights`, `adapter` and `context` (values of
    the whole graph, each in the order in which a walk from the output meets it).
    """

    text: tuple[object, ...]
    weights: tuple[ir.Value, ...]
    adapter: tuple[ir.Value, ...]
    context: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]  # in the walk's order: operands before what reads them


@dataclass
class _Walk:
    """Gathers one signature."""

    piece: Sequence[Segment]
    weight_names: Collection[str]
    adapter_names: Collection[str]
    without_slots: bool = False
    text: list[object] = field(default_factory=list)
    nodes: dict[ir.Node, int] = field(default_factory=dict)
    outside: dict[str, dict[ir.Value, int]] = field(
        default_factory=lambda: {"weight": {}, "adapter": {}, "context": {}, "parameter": {}}
    )

    def run(self) -> Signature:
        inside = {node for segment in self.piece for node in segment.nodes}
        hidden = self.piece[0].hidden
        stack: list[tuple[ir.Node, bool]] = []
        output = self._read(self.piece[-1].output)
        last = output.producer()
        assert last is not None
        stack.append((last, False))
        while stack:
            node, ready = stack.pop()
            if node in self.nodes:
                continue
            if not ready:
                stack.append((node, True))
                for value in reversed(self._operands(node)):
                    value = None if value is None or value is hidden else self._read(value)
                    producer = value.producer() if value is not None else None
                    if producer is not None and producer in inside:
                        stack.append((producer, False))
                continue
            self._describe(node, hidden, inside)
        self.text.append(("output", self.nodes[last], output.index()))
        return Signature(
            tuple(self.text),
            tuple(self.outside["weight"]),
            tuple(self.outside["adapter"]),
            tuple(self.outside["context"]),
            tuple(self.nodes),
        )

    def _read(self, value: ir.Value) -> ir.Value:
        """What is taken for a value."""
        return in_front(value) if self.without_slots else value

    def _operands(self, node: ir.Node) -> Sequence[ir.Value | None]:
        """What a node reads; how a weight is quantized is no matter of the structure."""
        return node.inputs[:1] if self.without_slots and node.op_type == "MatMulNBits" else node.inputs

    def _describe(self, node: ir.Node, hidden: ir.Value | None, inside: set[ir.Node]) -> None:
        read = self._operands(node)
        operands = tuple(self._operand(value, hidden, inside) for value in read)
        names = node.attributes.keys() if read is node.inputs else ("K", "N")
        attributes = tuple(sorted((name, str(node.attributes[name].value)) for name in names))
        self.nodes[node] = len(self.nodes)
        self.text.append((node.domain, node.op_type, attributes, operands, len(node.outputs)))

    def _operand(self, value: ir.Value | None, hidden: ir.Value | None, inside: set[ir.Node]) -> object:
        if value is None:
            return None
        if value is hidden:
            return "hidden"
        value = self._read(value)
        producer = value.producer()
        if producer is not None and producer in inside:
            return ("node", self.nodes[producer], value.index())
        if value.is_initializer() and value.name not in self.weight_names:
            tensor = value.const_value
            assert tensor is not None
            return ("constant", str(tensor.dtype), str(tensor.shape), tensor.tobytes())
        kind = (
            "weight"
            if value.is_initializer()
            else "adapter"
            if value.name in self.adapter_names
            else "context"
        )
        if self.without_slots and kind != "context":
            kind = "parameter"
        known = self.outside[kind]
        number = known.setdefault(value, len(known))
        return (kind, number, str(value.dtype), _sizes(value))


def describe(
    piece: Sequence[Segment], weight_names: Collection[str], adapter_names: Collection[str]
) -> Signature:
    """The signature of consecutive segments taken as one."""
    return _Walk(piece, weight_names, adapter_names).run()


def describe_structure(
    piece: Sequence[Segment], weight_names: Collection[str], adapter_names: Collection[str]
) -> tuple[object, ...]:
    """A description that is equal for pieces that compute the same but for what adapters do in them.

    What techniques have put behind a value is left out, and a parameter is one whether an adapter replaces it
    or not.
    """
    return _Walk(piece, weight_names, adapter_names, without_slots=True).run().text


def _sizes(value: ir.Value) -> tuple[object, ...] | None:
    """The shape; names of axes do not count, since every slot has a rank axis of its own."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else "?" for dim in value.shape)


def find_period(texts: Sequence[object]) -> tuple[int, int, int]:
    """Start, length and number of the repetitions that cover the most of `texts`; the shortest length among
    equals. `(0, 0, 0)` where nothing repeats."""
    best = (0, 0, 0)
    for length in range(1, len(texts) // 2 + 1):
        run = 0
        for index in range(length, len(texts) + 1):
            if index < len(texts) and texts[index] == texts[index - length]:
                run += 1
                continue
            repetitions = run // length + 1 if run >= length else 0
            if repetitions * length > best[1] * best[2]:
                best = (index - run - length, length, repetitions)
            run = 0
    return best
