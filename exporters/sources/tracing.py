"""Trace a transformers model to an `onnx_ir` graph whose weights are inputs named by their state-dict key."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from optimum.utils import DummyTextInputGenerator, NormalizedConfigManager, NormalizedTextConfig
from transformers import DynamicCache
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.pytorch_utils import Conv1D

from edgepeft.errors import ExportError

from ..graph import rename_axes, transposed_input
from .base import Traced

if TYPE_CHECKING:
    from .loading import Source

#: Sample sizes of the trace; 0 and 1 would be specialized by torch.export.
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_PAST = 2, 7, 5


def trace(source: Source, *, with_past: bool = False) -> Traced:
    """Trace `source` at opset 23 with symbolic axes `batch`, `sequence` (and `past_sequence`).

    Weights become graph inputs, so that no later optimization folds, transposes or merges them; tied weights
    are one input. With `with_past` the graph takes `past_key_values.{i}.key/value` `[batch, kv_heads,
    past_sequence, head_dim]` and returns `present.{i}.key/value`.

    Raises:
        ExportError: the model cannot be traced.
    """
    module = source.model
    inputs, shapes = _sample_inputs(source, with_past)
    module.config.use_cache = with_past
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=23, optimize=False)
    try:
        with _quiet(), torch.no_grad():
            program = OnnxExporter().export(module, inputs, config=config).program
    except Exception as error:  # torch.export raises whatever the model's own code raised
        raise ExportError(f"{source.name} cannot be traced by torch.export: {error}") from error
    layers = len(inputs["past_key_values"].layers) if with_past else 0
    _name_inputs_and_outputs(program.graph, layers)
    return Traced(program, _lift_weights(program.graph, module))


def _sample_inputs(source: Source, with_past: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sample keyword arguments of the model and the axes of each that vary."""
    config = source.config
    generator = DummyTextInputGenerator(
        source.task,
        _normalized(config),
        batch_size=SAMPLE_BATCH,
        sequence_length=SAMPLE_SEQUENCE,
    )
    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    inputs: dict[str, Any] = {name: generator.generate(name, framework="pt") for name in names}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # torch.export wants to be told of a table of positions, which bounds the sequence.
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=source.max_positions)
    shapes: dict[str, Any] = {name: {0: batch, 1: sequence} for name in names}
    if with_past:
        cache = _sample_cache(source, inputs)
        inputs["attention_mask"] = torch.ones(SAMPLE_BATCH, SAMPLE_PAST + SAMPLE_SEQUENCE, dtype=torch.long)
        inputs["past_key_values"] = cache
        past = torch.export.Dim("past_sequence")
        shapes["attention_mask"] = {0: batch, 1: torch.export.Dim.AUTO}
        shapes["past_key_values"] = [{0: batch, 2: past} for _ in range(2 * len(cache.layers))]
    return inputs, shapes


def _normalized(config: Any) -> Any:
    """optimum's view of the configuration; one for any text model where it has none for this type."""
    try:
        return NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        return NormalizedTextConfig(config)


def _sample_cache(source: Source, inputs: dict[str, Any]) -> DynamicCache:
    """A cache of `SAMPLE_PAST` positions, its sizes asked of the model.

    Every layer keeps all positions, sliding windows too: the mask is what narrows them.
    """
    source.model.config.use_cache = True
    with torch.no_grad():
        filled = source.model(**inputs).past_key_values
    cache = DynamicCache()
    for index, layer in enumerate(filled.layers):
        keys, values = (
            torch.zeros(SAMPLE_BATCH, kept.shape[1], SAMPLE_PAST, kept.shape[3])
            for kept in (layer.keys, layer.values)
        )
        cache.update(keys, values, index)
    return cache


def _name_inputs_and_outputs(graph: ir.Graph, layers: int) -> None:
    """Name caches as optimum does, and the symbolic axes by what they are."""
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        past = value.name.startswith("input.past_key_values")
        axes = ("batch", None, "past_sequence", None) if past else ("batch", "sequence")
        if layers and value.name == "attention_mask":
            axes = ("batch", "total_sequence")
        for dim, axis in zip(value.shape, axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and axis is not None:
                renamed[dim.value] = axis
        if value.name == "attention_mask":
            mask, mask_axes = value, axes
    rename_axes(graph, renamed)
    mask.shape = ir.Shape(mask_axes)  # its length with a cache may have come out as a sum
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
