"""Build a forward graph: traced model → optimized → LoRA slots and saved modules → frozen weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgepeft.bundle.manifest import LoraSlot, SavedModule
from edgepeft.errors import ExportError

from .graph import tidy
from .model_info import default_targets
from .passes.linears import find_linears, select
from .passes.lora import insert_lora_slots
from .passes.optimize import optimize_forward
from .passes.quantize import Freezer
from .passes.saved_modules import keep_saved_modules
from .sources.loading import Source
from .sources.pooling import append_pooling
from .sources.tracing import trace


@dataclass
class Forward:
    """A forward graph with its adapter inputs."""

    model: ir.Model
    model_inputs: tuple[str, ...]
    slots: tuple[LoraSlot, ...]
    saved_modules: tuple[SavedModule, ...]


def build_forward(
    source: Source,
    freezer: Freezer,
    *,
    modules: Iterable[str] | None,
    modules_to_save: Sequence[str] = (),
    with_past: bool = False,
) -> Forward:
    """Trace `source` and make it a graph that takes adapters as inputs.

    Args:
        freezer: stores the frozen weights, for this and the other graphs of the bundle.
        modules: names (or suffixes) of the linear modules that get a LoRA slot; None: all but the output
            head.
        modules_to_save: modules whose parameters stay inputs.
        with_past: with a key/value cache among the inputs and outputs.

    Raises:
        ExportError: the model cannot be traced, or a module is not in it.
    """
    traced = trace(source, with_past=with_past)
    graph = traced.model.graph
    optimize_forward(traced.model)
    by_name = {value.name or "": value for value in graph.inputs}
    weights = {name: by_name[name] for name in traced.weights if name in by_name}
    model_inputs = tuple(name for name in by_name if name not in weights)
    saved = keep_saved_modules(weights, modules_to_save)
    linears = find_linears(weights.values())
    chosen = select(linears, default_targets(source) if modules is None else modules)
    if not chosen:
        raise ExportError(f"{source.name} has no linear module that a LoRA could be added to")
    slots = insert_lora_slots(graph, chosen.values())
    if source.pooling is not None:
        append_pooling(graph, source.pooling)
    freezer.freeze(graph, {name: (value, traced.weights[name]) for name, value in weights.items()})
    tidy(traced.model)
    return Forward(traced.model, model_inputs, tuple(slots), tuple(saved))
