"""Replace products by and look-ups in frozen weights with onnxruntime's quantized operators.

Each weight is stored once. `MatMulNBits` reads packed codes `[N, K / block, block * bits / 8]`; an embedding
that the output layer shares is looked up by `GatherBlockQuantized` in the same bytes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from edgepeft.bundle.manifest import Quantization

from ..graph import FLOAT, append, initializer
from ..passes.weights.linears import find_embeddings, linear_products
from ..scratch import converted, spooled
from .blockwise import can_quantize, quantize
from .layouts import QuantizedWeight, concatenate
from .products import QuantizedConstant, TableConstant
from .row_norms import find_row_norms
from .table_weight import StoredWeight, TableWeight

#: Of a matrix that are looked at together.
_ROWS = 4096


class Reference(Mapping[str, torch.Tensor]):
    """The values that the graphs compute with, float32 by state-dict key, decoded when they are asked for."""

    def __init__(self) -> None:
        self._stored: dict[str, StoredWeight | torch.Tensor] = {}

    def add(self, name: str, stored: StoredWeight | torch.Tensor) -> None:
        """Note what the graphs hold of a weight."""
        self._stored[name] = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return converted(stored, torch.float32) if isinstance(stored, torch.Tensor) else stored.dequantize()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass
class Freezer:
    """Stores frozen weights at `bits`; one instance serves all graphs of a bundle, so that each is quantized
    once.

    Attributes:
        reference: the values that the graphs compute with.
        given: by state-dict key, weights that somebody else has quantized, which are stored as they are.
            Where there are any, other matrices lose nothing either: they are float16 or float32.
        exceptions: bits of the matrices that are stored with other than `bits`.
        quantized: by state-dict key, weights that are quantized; those of a calibration are there from the
            start.
        rounded: names of those that were not.
        row_norms: lengths of the rows of stored weights, float32 `[rows]`, by the constant's name.
    """

    bits: int
    block_size: int
    given: Mapping[str, StoredWeight] = field(default_factory=dict)
    reference: Reference = field(default_factory=Reference)
    exceptions: dict[str, int] = field(default_factory=dict)
    quantized: dict[str, StoredWeight] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    row_norms: dict[str, torch.Tensor] = field(default_factory=dict)

    def freeze(
        self,
        graph: ir.Graph,
        weights: dict[str, tuple[ir.Value, torch.Tensor]],
        parts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Turn the weight inputs into initializers: quantized where they are matrices, float32 otherwise.

        A matrix that no block divides, and an embedding that is not the largest (positions, token types), is
        kept in float16; vectors stay float32. The graph is left unsorted.

        Args:
            graph: the graph.
            weights: its weight inputs by name, with their values.
            parts: weights that are made of others, one below the other; those have been frozen before, and of
                these only the shape is asked.
        """
        parts = parts or {}
        largest = _largest_embedding(weights)
        for name, (value, tensor) in weights.items():
            if not value.uses():
                graph.inputs.remove(value)
                continue
            made_of = parts.get(name, ())
            if made_of and self.given:  # its values are nowhere
                stored = self.exceptions.get(made_of[0], 32)
            else:
                stored = self._bits_for(name, value, tensor, is_largest=name == largest)
            kept: StoredWeight | torch.Tensor
            if stored in (4, 8):
                kept = self._quantize(name, tensor, stored, made_of)
                _use_quantized(graph, value, kept)
            elif stored == 16:
                kept = converted(self._whole(tensor, made_of), torch.float16)
                _use_half(graph, value, kept.numpy())
            else:
                kept = converted(self._whole(tensor, made_of), torch.float32)
                _use_float(graph, value, kept.numpy())
            if not made_of:
                self.reference.add(name, kept)
                if tensor.ndim == 2 and (self.given or stored != self.bits):
                    self.exceptions[name] = stored
            graph.inputs.remove(value)
        for value, name in find_row_norms(graph):
            norms = torch.linalg.vector_norm(self.reference[name], dim=1)
            assert value.name is not None
            self.row_norms[value.name] = norms
            graph.inputs.remove(value)
            _use_float(graph, value, norms.numpy())

    def described(self) -> Quantization:
        """How the weights are stored, after all were frozen; of given ones, how most of them are."""
        named = [weight for name, weight in self.quantized.items() if name in self.reference]
        weights = sum(weight.shape[0] * weight.shape[1] for weight in named)
        each = 8 * sum(weight.nbytes for weight in named) / weights if weights else None
        if not self.given:
            return Quantization(self.bits, self.block_size, dict(self.exceptions), bits_a_weight=each)
        sizes: Counter[tuple[int, int]] = Counter()
        for name in self.exceptions.keys() & self.quantized.keys():
            weight = self.quantized[name]
            sizes[weight.bits, weight.block_size] += weight.packed.size
        bits, block_size = max(sizes, key=lambda kind: (sizes[kind], kind), default=(32, 0))
        others = {name: stored for name, stored in self.exceptions.items() if stored != bits}
        return Quantization(bits, block_size, others, bits_a_weight=each)

    def can_join(self, names: Sequence[str]) -> bool:
        """Whether these weights, which have been frozen, can stand one below the other as one."""
        kinds: set[object] = set()
        for name in names:
            weight = self.quantized.get(name)
            if isinstance(weight, TableWeight):
                return False
            kinds.add(self.exceptions.get(name) if weight is None else weight.kind)
        return len(kinds) == 1

    def _whole(self, tensor: torch.Tensor, parts: Sequence[str]) -> torch.Tensor:
        if not parts:
            return tensor
        return spooled(tensor.shape, torch.float32, (self.reference[part] for part in parts))

    def _quantize(self, name: str, tensor: torch.Tensor, bits: int, parts: Sequence[str]) -> StoredWeight:
        if name not in self.quantized:
            if parts:
                joined = [self.quantized[part] for part in parts]
                self.quantized[name] = concatenate(
                    [weight for weight in joined if isinstance(weight, QuantizedWeight)]
                )
            else:
                self.quantized[name] = quantize(tensor, bits, self.block_size)
                self.rounded.append(name)
        return self.quantized[name]

    def _bits_for(self, name: str, value: ir.Value, tensor: torch.Tensor, *, is_largest: bool) -> int:
        if name in self.given and _is_quantizable(value):
            if name not in self.quantized:
                self.quantized[name] = self.given[name]
            weight = self.quantized[name]
            return 32 if isinstance(weight, TableWeight) and find_embeddings([value]) else weight.bits
        if self.given:
            return 16 if tensor.ndim == 2 and _is_half(tensor) else 32
        if tensor.ndim != 2 or self.bits == 32:
            return 32
        small_table = bool(find_embeddings([value])) and not is_largest
        if self.bits == 16 or small_table or not can_quantize(tensor.shape[1], self.block_size):
            return 16
        if not _is_quantizable(value):
            return 16
        return self.quantized[name].bits if name in self.quantized else self.bits


def _is_half(tensor: torch.Tensor) -> bool:
    """Whether float16 holds all values."""
    return all(torch.equal(part, part.half().to(part.dtype)) for part in tensor.split(_ROWS))


def _largest_embedding(weights: dict[str, tuple[ir.Value, torch.Tensor]]) -> str | None:
    tables = {name: tensor.numel() for name, (value, tensor) in weights.items() if find_embeddings([value])}
    return max(tables, key=lambda name: tables[name]) if tables else None


def _is_quantizable(weight: ir.Value) -> bool:
    """Whether every use of `weight` is a linear or a look-up."""
    products = {node for node, _ in linear_products(weight)}
    lookups = {lookup.node for lookup in find_embeddings([weight])}
    return all(
        node in products or node in lookups or (node.op_type == "Transpose" and _feeds_only(node, products))
        for node, _ in weight.uses()
    )


def _feeds_only(node: ir.Node, consumers: set[ir.Node]) -> bool:
    return all(consumer in consumers for consumer, _ in node.outputs[0].uses())


def _use_quantized(graph: ir.Graph, weight: ir.Value, quantized: StoredWeight) -> None:
    products = linear_products(weight)
    lookups = find_embeddings([weight])
    transposes = {node for node, _ in weight.uses() if node.op_type == "Transpose"}
    assert weight.name is not None
    constant: QuantizedConstant | TableConstant
    if isinstance(quantized, TableWeight):
        constant = TableConstant(graph, weight.name, quantized)
    else:
        constant = QuantizedConstant(graph, weight.name, quantized)
    for node, x in products:
        y = node.outputs[0]
        product = constant.multiply(x, y.shape)
        producer = product.producer()
        assert producer is not None
        producer.metadata_props.update(node.metadata_props)
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            product = append(graph, "Add", [product, node.inputs[2]], shape=y.shape)
        _replace(graph, node, product)
    for lookup in lookups:
        rows = lookup.node.outputs[0]
        ids = lookup.node.inputs[1]
        assert rows.shape is not None
        assert ids is not None
        assert isinstance(constant, QuantizedConstant)
        _replace(graph, lookup.node, constant.look_up(ids, rows.shape))
    for node in transposes:
        graph.remove(node, safe=True)


def _replace(graph: ir.Graph, node: ir.Node, replacement: ir.Value) -> None:
    old = node.outputs[0]
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = replacement
        name, old.name = old.name, None
        replacement.name = name
    old.replace_all_uses_with(replacement)
    graph.remove(node, safe=True)


def _use_half(graph: ir.Graph, weight: ir.Value, array: np.ndarray) -> None:
    """float16 on disk: a look-up gathers halves and casts the rows; anything else casts the whole weight."""
    half = initializer(graph, f"{weight.name}.f16", array)
    others = []
    for node, index in list(weight.uses()):
        if node.op_type == "Gather" and index == 0:
            old = node.outputs[0]
            rows = append(
                graph, "Gather", [half, node.inputs[1]], {"axis": 0}, shape=old.shape, dtype=half.dtype
            )
            _replace(graph, node, append(graph, "Cast", [rows], {"to": FLOAT}, shape=old.shape))
        else:
            others.append((node, index))
    if others:
        cast = append(graph, "Cast", [half], {"to": FLOAT}, shape=weight.shape)
        for node, index in others:
            node.replace_input_with(index, cast)


def _use_float(graph: ir.Graph, weight: ir.Value, array: np.ndarray) -> None:
    name = weight.name
    assert name is not None
    weight.name = f"{name}.input"
    weight.replace_all_uses_with(initializer(graph, name, array))
