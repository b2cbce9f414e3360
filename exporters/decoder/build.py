"""The graph that generates: tokens into a cache of fixed size, logits of the last one out.

Made from the same trace as the inference graph and of the same weights, for speed: attention writes its keys
and values in place, what only the logits need sees one token a row, layers that read the same value are one
product, and a LoRA costs two small nodes a result; a second graph without them is for no adapter. Where a
model does not allow it, there is none, and the inference graph generates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from edgepeft.bundle.memory_formula import UNKNOWN_MEMORY
from edgepeft.bundle.wiring import DecoderGraph
from edgepeft.techniques.base import Settings

from ..graph import tidy
from ..passes.drop_cache import is_cache
from ..passes.shapes.from_inputs import take_sizes_from_inputs
from ..passes.weights.linears import Linear, find_linears, find_marked_linears, unpack
from ..passes.weights.side_by_side import put_side_by_side
from ..quantize.freeze import Freezer
from ..sources.base import Lookup
from ..techniques import find_sites, insert_slots
from ..techniques.base import BaseGraph
from ..techniques.lora_groups import insert_lora_groups, remove_lora_groups
from ..writer import WeightWriter
from .cache_in_place import keep_cache_in_place
from .flat_tokens import flatten_tokens
from .fuse_sums import fuse_sums
from .half_bytes import multiply_by_half_bytes
from .last_token import keep_last_token
from .slice_output_layer import slice_output_layer

ROLE, PLAIN_ROLE = "decoder", "decoder.plain"
INT8_ROLE, INT8_PLAIN_ROLE = "decoder.int8", "decoder.int8.plain"


@dataclass
class Decoder:
    """The graphs by role, what the manifest says of them, and by name each weight that one graph reads whole
    and another in parts, with the rows of its parts."""

    graphs: dict[str, ir.Model]
    wiring: DecoderGraph
    parts: dict[str, tuple[ir.TensorProtocol, list[int]]]

    def write_weights(self, weights: WeightWriter) -> None:
        """Store the weights that have parts, so that the graphs which read those share the bytes."""
        for name, (tensor, rows) in self.parts.items():
            weights.add_parts(name, tensor, rows)


def build_decoder(
    model: ir.Model,
    tensors: dict[str, torch.Tensor],
    packed: dict[str, dict[str, int]],
    turned: Collection[str],
    lookups: Mapping[str, Lookup],
    modules: Collection[str],
    others: Mapping[str, Mapping[str, Settings]],
    freezer: Freezer,
    max_length: int,
) -> Decoder | None:
    """Make the decoder of an optimized trace, which is changed.

    Args:
        model: with a key/value cache, its weights inputs.
        tensors: the weights by name.
        packed: see `Traced`.
        turned: see `Traced`.
        lookups: see `Traced`.
        modules: names of the linears that have LoRA slots.
        others: modules that have slots of other techniques or a LoRA elsewhere, which the plain graph has
            too.
        freezer: that has stored the weights for the inference graph.
        max_length: positions that the model knows.

    Returns:
        The decoder, or None where the graph has no cache, or one that cannot stay in place.
    """
    graph = model.graph
    if not keep_cache_in_place(model, max_length):
        return None
    by_name = {value.name or "": value for value in graph.inputs}
    weights = {name: (by_name[name], tensors[name]) for name in tensors if name in by_name}
    found = find_linears([value for value, _ in weights.values()]) | find_marked_linears(graph)
    linears = unpack(found, packed)
    values = {name: value for name, (value, _) in weights.items()}
    base = BaseGraph(graph, values, tensors, linears, turned, lookups)
    insert_slots(base, find_sites(base, others))
    weights = {name: weights[name] for name in base.weights}
    keep_last_token(graph, graph.outputs[0])
    take_sizes_from_inputs(graph)
    _count_rows_of_tokens(graph)
    tidy(model)
    joined = put_side_by_side(graph, weights, freezer.can_join)
    chosen: list[Linear] = [linear for name, linear in linears.items() if name in modules]
    groups = insert_lora_groups(graph, chosen, joined.places)
    freezer.freeze(graph, weights, joined.parts)
    tidy(model)
    plain = model.clone()
    remove_lora_groups(plain.graph, groups)
    flatten_tokens(graph)  # which lets a LoRA be a `Gemm`; without one it would only be more nodes
    parts = _joined_weights(
        graph, {name: [len(tensors[part]) for part in of] for name, of in joined.parts.items()}
    )
    for each in (model, plain):
        tidy(each)
        fuse_sums(each.graph)
        tidy(each)
        parts |= slice_output_layer(each.graph)  # the same weights in both
        tidy(each)
    if not (_stands_alone(graph) and _stands_alone(plain.graph)):
        return None
    graphs = {ROLE: model, PLAIN_ROLE: plain}
    wiring = DecoderGraph(ROLE, PLAIN_ROLE, tuple(groups), UNKNOWN_MEMORY)
    if any(node.op_type == "MatMulNBits" for node in graph):
        graphs |= {INT8_ROLE: _int8(model), INT8_PLAIN_ROLE: _int8(plain)}
        wiring = DecoderGraph(
            ROLE, PLAIN_ROLE, tuple(groups), UNKNOWN_MEMORY, INT8_ROLE, INT8_PLAIN_ROLE, UNKNOWN_MEMORY
        )
    for each in (model, plain):
        if multiply_by_half_bytes(each.graph):
            tidy(each)
    return Decoder(graphs, wiring, parts)


def _joined_weights(
    graph: ir.Graph, rows: Mapping[str, list[int]]
) -> dict[str, tuple[ir.TensorProtocol, list[int]]]:
    """What is stored of each joined weight, its codes and scales for one, and the rows of its parts."""
    found = {}
    for name, value in graph.initializers.items():
        stem = next((stem for stem in rows if name == stem or name.startswith(f"{stem}.")), None)
        if stem is not None and value.const_value is not None:
            found[name] = value.const_value, rows[stem]
    return found


def _count_rows_of_tokens(graph: ir.Graph) -> None:
    """Ask the tokens, and no other input, how many rows there are."""
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    for node in graph:
        if node.op_type != "Shape" or node.inputs[0] not in graph.inputs:
            continue
        if (node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)) == (0, 1):
            node.replace_input_with(0, ids)


def _stands_alone(graph: ir.Graph) -> bool:
    """Drop the mask, which nothing may read any more; nothing but attention may read the cache."""
    for value in list(graph.inputs):
        readers = {node.op_type for node, _ in value.uses()}
        if value.name == "attention_mask" and not readers:
            graph.inputs.remove(value)
        elif value.name == "attention_mask" or (is_cache(value) and readers != {"GroupQueryAttention"}):
            return False
    return True


def _int8(model: ir.Model) -> ir.Model:
    """The same graph, its products rounding activations to 8 bits."""
    copied = model.clone()
    for node in copied.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    return copied
