"""Trace a transformers model to an `onnx_ir` graph whose weights are inputs named by their state-dict key."""

from __future__ import annotations

import io
import logging
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch
import transformers
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.pytorch_utils import Conv1D

from edgepeft.errors import ExportError

from ..graph import rename_axes, transposed_input
from ..passes.drop_cache import PAST, PRESENT
from ..versions import range_run
from .base import Traced
from .loaded_model import LoadedModel
from .quick_trace import quick_trace
from .samples import Samples, sample_inputs
from .tied_weights import canonical_names


def trace(source: LoadedModel, *, with_past: bool = False) -> Traced:
    """Trace `source` at opset 23 with symbolic axes `batch`, `sequence` (and `past_sequence`).

    Weights become graph inputs, so that no later optimization folds, transposes or merges them; tied weights
    are one input. With `with_past` the graph takes `past_key_values.{i}.key/value` `[batch, kv_heads,
    past_sequence, head_dim]` and returns `present.{i}.key/value`.

    Raises:
        ExportError: the model cannot be traced.
    """
    module = source.model
    with _quiet():
        samples = sample_inputs(source, with_past)
    module.config.use_cache = with_past
    config = OnnxConfig(dynamic=True, dynamic_shapes=samples.shapes, opset_version=23, optimize=False)
    try:
        with _quiet(), quick_trace(), torch.no_grad():
            # transformers 5.23 wraps what older ones return, torch's ONNXProgram.
            exported: Any = OnnxExporter().export(module, samples.inputs, config=config)
    except Exception as error:  # torch.export raises whatever the model's own code raised
        raise ExportError(_untraced(source, with_past, error)) from error
    program: ir.Model = exported.program if hasattr(exported, "program") else exported.model
    caches = _name_inputs(program.graph, samples, source.name)
    _name_presents(program.graph, caches, source.name)
    if source.task == "text2text-generation":  # the encoder's states are for a cache
        program.graph.outputs[:] = program.graph.outputs[:1]
    return Traced(program, _lift_weights(program.graph, module))


def _untraced(source: LoadedModel, with_past: bool, error: Exception) -> str:
    """Why a model is refused that torch.export does not trace."""
    what = f"{source.name} ({source.architecture})"
    while error.__cause__ is not None:  # torch's own errors say where it failed, the first one why
        error = error.__cause__  # type: ignore[assignment]
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = reason.partition("! For more information")[0]
    if source.task == "text-generation" and not with_past:
        return (
            f"{what} keeps something else than keys and values of every layer while it writes, and cannot be "
            f"traced without that, either ({reason[:200]}): choose a model whose layers all have attention"
        )
    return f"{what} cannot be traced by torch.export: {reason[:400]}"


def _name_inputs(graph: ir.Graph, samples: Samples, model: str) -> list[ir.Value]:
    """Name the graph's inputs and their symbolic axes by what they are; return those of the cache.

    torch.export lays inputs out in the order of the arguments, the tensors within one in that of its pytree.
    What they are called differs from version to version of transformers and is not asked.

    Raises:
        ExportError: the graph's inputs are not those that the model was traced with.
    """
    named = samples.named_leaves()
    inputs = list(graph.inputs)
    shapes = [[dim if isinstance(dim, int) else None for dim in value.shape or ()] for value in inputs]
    if len(named) != len(inputs) or not all(
        len(shape) == leaf.tensor.ndim
        and all(dim in (None, size) for dim, size in zip(shape, leaf.tensor.shape, strict=True))
        for shape, leaf in zip(shapes, named, strict=True)
    ):
        got = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        expected = ", ".join(f"{leaf.name} {list(leaf.tensor.shape)}" for leaf in named)
        raise ExportError(
            f"{model}: the traced graph takes other inputs than the model was given: got {got}; expected "
            f"{expected}. transformers {transformers.__version__} traces in a way that edgepeft does not "
            f"know: install one of the versions that were run ({range_run('transformers')})"
        )
    renamed: dict[str, str] = {}
    for value, leaf in zip(inputs, named, strict=True):
        value.name = leaf.name
        for dim, axis in zip(value.shape or (), leaf.axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and axis is not None:
                renamed[dim.value] = axis
    rename_axes(graph, renamed)
    for value in inputs:
        if value.name == "attention_mask":  # its length with a cache may have come out as a sum
            value.shape = ir.Shape(samples.axes["attention_mask"])
    return [value for value, leaf in zip(inputs, named, strict=True) if leaf.cached]


def _name_presents(graph: ir.Graph, caches: Sequence[ir.Value], model: str) -> None:
    """Put the outputs of the grown cache into the order of `caches` and name them after these.

    Each is the first thing that is computed of its own past, by concatenation.

    Raises:
        ExportError: the outputs behind the first are not one for each of `caches`.
    """
    if not caches:
        return
    first, *rest = graph.outputs
    grown = {_nearest(output, caches): output for output in rest}
    if len(rest) != len(caches) or set(grown) != set(caches):
        raise ExportError(
            f"{model}: the traced graph returns {len(rest)} values behind its logits, expected the keys and "
            f"values of {len(caches) // 2} layers, each grown from its own past"
        )
    graph.outputs[:] = [first, *(grown[cache] for cache in caches)]
    for cache in caches:
        assert cache.name is not None
        grown[cache].name = cache.name.replace(PAST, PRESENT)


def _nearest(output: ir.Value, inputs: Sequence[ir.Value]) -> ir.Value | None:
    """The one of `inputs` from which the fewest operators lead to `output`."""
    wanted, seen, queue = set(inputs), set[ir.Value](), deque([output])
    while queue:
        value = queue.popleft()
        if value in wanted:
            return value
        node = value.producer()
        for taken in () if node is None else node.inputs:
            if taken is not None and taken not in seen:
                seen.add(taken)
                queue.append(taken)
    return None


def _lift_weights(graph: ir.Graph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Turn the module's parameters among the initializers into graph inputs; return them by name.

    A shared one has its canonical name. The weight of a `Conv1D` (GPT-2), `[in, out]`, becomes one like any
    linear's, `[out, in]`.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    canonical = canonical_names(module)
    turned = conv1d_weights(module)
    weights: dict[str, torch.Tensor] = {}
    for found in list(graph.initializers):
        if found not in parameters:
            continue
        value = graph.initializers.pop(found)
        value.const_value = None
        value.name = name = canonical[found]
        weights[name] = parameters[name].detach()
        if name in turned:
            weights[name] = weights[name].T
            value = transposed_input(graph, value)
        graph.inputs.append(value)
    return weights


def conv1d_weights(module: torch.nn.Module) -> set[str]:
    """Names of the weights that transformers keeps as `[in, out]`."""
    return {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, Conv1D)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress marks and their notes on versions and on packages that are not
    installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
