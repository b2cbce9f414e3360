"""Build a forward graph: traced model → optimized → slots for adapters → frozen weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from edgepeft.bundle.manifest import LinearHead
from edgepeft.errors import ExportError
from edgepeft.slots import LORA, WHOLE, Slot
from edgepeft.techniques import technique
from edgepeft.techniques.base import Settings

from .decoder.build import Decoder, build_decoder
from .graph import tidy
from .passes.optimize import optimize_forward
from .passes.pool_before_head import pool_before_head
from .passes.weights.linear_head import add_features, find_linear_head, free_labels
from .passes.weights.linears import find_linears, find_marked_linears, unpack
from .quantize.freeze import Freezer
from .sources.base import ModelSource
from .sources.model_info import default_targets
from .sources.pooling import append_pooling
from .sources.tasks import CLASSIFICATION
from .techniques import find_sites, insert_slots, plain_slots
from .techniques.base import BaseGraph


@dataclass
class Forward:
    """A forward graph and its adapter inputs; `saved_values` are the base's own, by `SlotTensor.default`;
    `decoder` is the graph that generates, where there is one, `undecoded` why slots leave none, and
    `linear_head` the layer that makes a classifier's outputs, if it is one."""

    model: ir.Model
    model_inputs: tuple[str, ...]
    slots: tuple[Slot, ...]
    saved_values: dict[str, torch.Tensor]
    decoder: Decoder | None = None
    undecoded: str | None = None
    linear_head: LinearHead | None = None


def build_forward(
    source: ModelSource,
    freezer: Freezer,
    *,
    modules: Mapping[str, Mapping[str, Settings]] | None,
    modules_to_save: Sequence[str] = (),
    training: bool = False,
) -> Forward:
    """Trace `source` and make it a graph that takes adapters as inputs.

    Args:
        freezer: stores the frozen weights, for this and the other graphs of the bundle.
        modules: names (or suffixes) of the modules that get a slot, with its settings, by technique; None: a
            LoRA on all linears but the output head.
        modules_to_save: modules whose parameters stay inputs, or single parameters.
        training: the graph that is to be differentiated, without a key/value cache.

    Raises:
        ExportError: the model cannot be traced, or a module is not in it.
    """
    traced = source.trace(training=training)
    graph = traced.model.graph
    optimize_forward(traced.model)
    by_name = {value.name or "": value for value in graph.inputs}
    weights = {name: by_name[name] for name in traced.weights if name in by_name}
    model_inputs = tuple(name for name in by_name if name not in weights)
    linears = unpack(find_linears(weights.values()) | find_marked_linears(graph), traced.packed)
    wanted = {LORA: plain_slots(default_targets(source))} if modules is None else modules
    named = {name for of_technique in wanted.values() for name in of_technique}
    # One adapter may have a LoRA on what another replaces whole; then it is named, not meant by its ending.
    whole = tuple(f"{module}." for module in modules_to_save)
    offered = {
        name: item for name, item in linears.items() if name in named or not f"{name}.".startswith(whole)
    }
    base = BaseGraph(graph, weights, traced.weights, offered, traced.turned, traced.lookups)
    asked = {WHOLE: plain_slots(modules_to_save), **wanted}
    sites = find_sites(base, asked)
    if modules is None and not any(sites.values()):
        raise ExportError(
            f"{source.name} has no linear module that a LoRA could be added to: --targets '' exports it "
            "without"
        )
    generates = source.task == "text-generation" and not training
    matrices = [name for name in sites[WHOLE] if len(weights[name].shape or ()) > 1]
    plain = traced.model.clone() if generates and not matrices else None
    slots = insert_slots(base, sites)
    if source.pooling is not None:
        append_pooling(graph, source.pooling)
    if source.task in CLASSIFICATION:
        pool_before_head(graph)
    freezer.freeze(graph, {name: (value, traced.weights[name]) for name, value in weights.items()})
    tidy(traced.model)
    values = {
        name: traced.weights[name].T.contiguous() if name in traced.turned else traced.weights[name]
        for name in (tensor.default for slot in slots for tensor in slot.tensors)
        if name is not None and name not in freezer.row_norms
    } | freezer.row_norms
    forward = Forward(traced.model, model_inputs, tuple(slots), values)
    if source.task in CLASSIFICATION:
        forward.linear_head = _linear_head(graph, has_labels=source.problem_type != "regression")
    if generates and matrices:
        forward.undecoded = f"an adapter replaces {matrices[0]} whole"
    if plain is not None:
        forward.decoder = build_decoder(
            plain,
            traced.weights,
            traced.packed,
            traced.turned,
            traced.lookups,
            [slot.module for slot in slots if slot.is_packed],
            {
                name: {
                    module: item
                    for module, item in own.items()
                    if (name != LORA or item) and technique(name).in_decoder(module)
                }
                for name, own in asked.items()
            },
            freezer,
            source.max_length,
        )
    return forward


def _linear_head(graph: ir.Graph, *, has_labels: bool) -> LinearHead | None:
    """The layer that makes the logits, whose features the graph puts out from now on; labels may be added."""
    head = find_linear_head(graph.outputs[0])
    if head is None:
        return None
    if has_labels:
        free_labels(head, graph.outputs[0])
    add_features(graph, head)
    return LinearHead(head.weight.name or "", None if head.bias is None else head.bias.name)
