"""Structured pruning: remove the channels of feed-forward layers that cost least, so that all graphs are
smaller.

Layers go in the order in which the model runs them. For each the records run through the model as it is by
then, channels are chosen for what the layer reads of them, and the weights that read the channels which are
left make up for those which are gone (`least_squares`). Every layer keeps as many, so that what comes out is
a model that transformers loads. docs/decisions/pruning.md says why it is feed-forward channels that go.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Pruning
from edgepeft.errors import AdapterError, ExportError, UsageError
from edgepeft.files import temporary_folder

from ..calibration.calibrate import Progress
from ..calibration.groups import Feeds
from ..calibration.passes import Passes
from ..calibration.records import usable_records
from ..calibration.rounding import looked_at, representative
from ..options import ExportOptions
from ..sources.base import ModelSource
from ..sources.open import opened_source
from ..sources.transformers_model import Source
from .feed_forward import FeedForward, feed_forwards, matrix, resize, rows_of, set_linear
from .least_squares import InputMoments, narrowed

#: Widths are multiples of the block that shares a scale; of wide layers of this, which kernels like.
_MULTIPLE, _WIDE = 64, 1024


def prune(
    model: Any,
    share: float | str,
    *,
    calibration: str | Path | Iterable[Mapping[str, Any]] | None = None,
    task: str | None = None,
    block_size: int = 32,
    seed: int = 0,
) -> Any:
    """The pruned PyTorch model that `edgepeft export --prune` makes a bundle of.

    Save it and export that folder where adapters that were trained on the device are to be opened in PEFT, so
    that there is one pruned model:

        pruned = edgepeft.exporters.prune("SmolLM2-135M-Instruct", "25%")
        pruned.save_pretrained("pruned")
        AutoTokenizer.from_pretrained("SmolLM2-135M-Instruct").save_pretrained("pruned")
        edgepeft.export("pruned", "chat.edge")

    Args:
        model: a transformers model object, which is left as it is, or a folder, a hub id or a file as
            `edgepeft.export` takes it, of floats.
        share: see `ExportOptions.prune`, as `calibration`, `task`, `block_size` and `seed`.

    Returns:
        A transformers model, float32, in evaluation mode.

    Raises:
        UsageError: an argument cannot be used.
        ExportError: the model cannot be loaded, or has no layers that could be narrower.
        DataError: a record cannot be used, or there is none.
    """
    options = ExportOptions(prune=share, calibration=calibration, task=task, block_size=block_size, seed=seed)
    records = usable_records(options, model)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        source = stack.enter_context(opened_source(model, task=task, labels=None, seed=seed))
        check_prunable(source, records)
        assert isinstance(source, Source)
        if source.quantized:
            raise UsageError(
                f"{source.name}: its weights are quantized already, and pruning makes others: prune the "
                "float model that was quantized"
            )
        feeds = representative(source, records, options, folder / "records")
        prune_source(source, feeds, options)
        pruned: Any = source.model
    return pruned


def check_prunable(source: ModelSource, records: Sequence[object]) -> None:
    """Refuse what cannot be pruned before any work is done.

    Raises:
        UsageError: it is no transformers model; or writes no text and there are no records.
    """
    if not isinstance(source, Source):
        raise UsageError("--prune needs a transformers model: the layers of an ONNX file stay as they are")
    if not records and source.task != "text-generation":
        raise UsageError(
            f"--prune needs to see what the layers of {source.name} read, and a model for {source.task} "
            "writes no text of its own: give records like those it will read with --calibration"
        )


def check_adapters(adapters: Iterable[Adapter], base: str) -> None:
    """Refuse adapters that were made for the model before it was pruned.

    Args:
        adapters: those that were given.
        base: fingerprint of the pruned model.

    Raises:
        AdapterError: names the first.
    """
    for adapter in adapters:
        if adapter.base != base:
            raise AdapterError(
                f"{adapter.origin}: was not trained on this model as it is pruned (base "
                f"{str(adapter.base)[:12]!r}, pruned {base[:12]!r}), and an adapter of the whole model does "
                "not fit: prune first and train the adapter on that bundle, or leave --prune out"
            )


def prune_source(
    source: ModelSource,
    feeds: Sequence[Feeds],
    options: ExportOptions,
    progress: Progress = lambda _done, _total: None,
) -> Pruning:
    """Prune a source's model in place.

    Takes one run of the feeds through the model, and one block more a layer.

    Args:
        source: a transformers model.
        feeds: its keyword arguments for what it is to be pruned for, without padding.
        options: says how much, and the block size of the quantization to come.
        progress: is told how many layers of how many are done.

    Raises:
        ExportError: there are no layers that could be narrower.
        UsageError: more is to go than they hold.
    """
    assert isinstance(source, Source)
    assert options.prune_share is not None
    model = source.model
    model.config.use_cache = False
    layers, blocks = feed_forwards(model, feeds[0])
    whole = sum(matrix(model, name).numel() for name in source.linear_names())
    kept = _widths(source, layers, options.prune_share * whole, whole, options.block_size)
    sizes = resize(model.config, kept)
    errors: dict[str, float] = {}
    passes = Passes(model, feeds, blocks)
    with torch.no_grad():
        for layer in layers:
            progress(len(errors), len(layers))
            errors[f"{layer.consumer}.weight"] = _narrow(model, passes, layer, kept[layer.channels])
        progress(len(layers), len(layers))
    left = sum(matrix(model, name).numel() for name in source.linear_names())
    count, inputs = looked_at(feeds, options)
    source.quantized = {}
    return Pruning(
        share=1 - left / whole,
        sizes=sizes,
        records=count,
        inputs=inputs,
        errors=errors,
    )


def _narrow(model: Any, passes: Passes, layer: FeedForward, kept: int) -> float:
    """Narrow one layer; returns what fraction it loses of what it made."""
    consumer = model.get_submodule(layer.consumer)
    inputs = InputMoments.empty(layer.channels)
    for rows in passes.inputs(layer.group):
        inputs.add(rows)
    found = narrowed(matrix(model, layer.consumer), consumer.bias, inputs, kept)
    for name in layer.producers:
        weight, bias = matrix(model, name), model.get_submodule(name).bias
        rows = rows_of(found.kept, layer, len(weight))
        set_linear(model, name, weight[rows], None if bias is None else bias[rows])
    set_linear(model, layer.consumer, found.weight, found.bias)
    return found.error


def _widths(
    source: Source, layers: Sequence[FeedForward], gone: float, whole: int, block_size: int
) -> dict[int, int]:
    """New widths by old ones, so that about `gone` of the linears' `whole` weights go.

    Raises:
        ExportError: there are no layers.
        UsageError: they hold too little.
    """
    if not layers:
        raise ExportError(
            f"--prune: {source.name} ({source.architecture}) has no feed-forward layers that edgepeft knows "
            "(linears around an activation, whose width its configuration says): leave --prune out"
        )
    held = sum(
        matrix(source.model, name).numel() for layer in layers for name in (*layer.producers, layer.consumer)
    )
    kept = {}
    for width in {layer.channels for layer in layers}:
        multiple = max(block_size, _MULTIPLE) if width >= _WIDE else block_size
        kept[width] = multiple * round(width * (1 - gone / held) / multiple)
        if kept[width] < multiple:
            raise UsageError(
                f"--prune {gone / whole:.0%}: only feed-forward channels are removed, which hold "
                f"{held / whole:.0%} of the weights of {source.name}'s linears, and {multiple} of {width} "
                "must be left: give less"
            )
        if kept[width] >= width:
            raise UsageError(
                f"--prune {gone / whole:.1%}: channels go by {multiple}, and that is not as many of {width}: "
                "give more, or leave it out"
            )
    return kept
