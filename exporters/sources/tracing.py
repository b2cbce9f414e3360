"""Trace a transformers model to an `onnx_ir` graph whose weights are inputs named by their state-dict key."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.pytorch_utils import Conv1D

from edgepeft.errors import ExportError

from ..graph import rename_axes, transposed_input
from .base import Traced
from .samples import Samples, sample_inputs

if TYPE_CHECKING:
    from .loading import Source


def trace(source: Source, *, with_past: bool = False) -> Traced:
    """Trace `source` at opset 23 with symbolic axes `batch`, `sequence` (and `past_sequence`).

    Weights become graph inputs, so that no later optimization folds, transposes or merges them; tied weights
    are one input. With `with_past` the graph takes `past_key_values.{i}.key/value` `[batch, kv_heads,
    past_sequence, head_dim]` and returns `present.{i}.key/value`.

    Raises:
        ExportError: the model cannot be traced.
    """
    module = source.model
    samples = sample_inputs(source, with_past)
    module.config.use_cache = with_past
    config = OnnxConfig(dynamic=True, dynamic_shapes=samples.shapes, opset_version=23, optimize=False)
    try:
        with _quiet(), torch.no_grad():
            program = OnnxExporter().export(module, samples.inputs, config=config).program
    except Exception as error:  # torch.export raises whatever the model's own code raised
        raise ExportError(f"{source.name} cannot be traced by torch.export: {error}") from error
    layers = len(samples.inputs["past_key_values"].layers) if with_past else 0
    _name_inputs_and_outputs(program.graph, samples, layers)
    if source.task == "text2text-generation":  # the encoder's states are for a cache
        program.graph.outputs[:] = program.graph.outputs[:1]
    return Traced(program, _lift_weights(program.graph, module))


def _name_inputs_and_outputs(graph: ir.Graph, samples: Samples, layers: int) -> None:
    """Name caches as optimum does, and the symbolic axes by what they are."""
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        past = value.name.startswith("input.past_key_values")
        axes = ("batch", None, "past_sequence", None) if past else samples.axes[value.name]
        for dim, axis in zip(value.shape, axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and axis is not None:
                renamed[dim.value] = axis
    rename_axes(graph, renamed)
    for value in graph.inputs:
        if value.name == "attention_mask":  # its length with a cache may have come out as a sum
            value.shape = ir.Shape(samples.axes["attention_mask"])
    if layers:
        caches = [value for value in graph.inputs if (value.name or "").startswith("input.past_key_values")]
        presents = list(graph.outputs)[1:]
        for index, (cache, present) in enumerate(zip(caches, presents, strict=True)):
            kind = ("key", "value")[index % 2]
            cache.name = f"past_key_values.{index // 2}.{kind}"
            present.name = f"present.{index // 2}.{kind}"


def _lift_weights(graph: ir.Graph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Turn the module's parameters among the initializers into graph inputs; return them by name.

    The weight of a `Conv1D` (GPT-2), `[in, out]`, becomes one like any linear's, `[out, in]`.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    turned = conv1d_weights(module)
    weights = {}
    for name in list(graph.initializers):
        if name not in parameters:
            continue
        value = graph.initializers.pop(name)
        value.const_value = None
        weights[name] = parameters[name].detach()
        if name in turned:
            weights[name] = weights[name].T.contiguous()
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
