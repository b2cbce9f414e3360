"""Sample inputs to trace a model with, and the names of their axes, one function a kind of input."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from optimum.utils import DummyTextInputGenerator, NormalizedConfigManager, NormalizedTextConfig
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache

from edgepeft.errors import ExportError

from ..passes.drop_cache import PAST
from .loaded_model import LoadedModel

#: Sample sizes of the trace; 0 and 1 would be specialized by torch.export.
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_PAST, SAMPLE_TARGET = 2, 7, 5, 6
#: Samples of a recording, in strides of the feature encoder.
SAMPLE_STRIDES = 40


@dataclass(frozen=True)
class Leaf:
    """One tensor that a model is traced with: the graph input it becomes, what its axes are called there."""

    name: str
    tensor: torch.Tensor
    axes: tuple[str | None, ...]
    cached: bool = False


@dataclass
class Samples:
    """Keyword arguments of the model.

    Attributes:
        inputs: tensors (and a cache) by argument name.
        shapes: for torch.export, the axes of each that vary.
        axes: by argument name, what its axes are called in the graph; None for one of fixed size.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple[str | None, ...]] = field(default_factory=dict)

    def named_leaves(self) -> list[Leaf]:
        """All tensors in the order in which torch.export lays them out, a cache's `[batch, kv_heads,
        past_sequence, head_dim]` named as optimum does: `past_key_values.{i}.key` and `.value`.

        The cache's pytree says in which order its tensors come; transformers registers it when it first
        exports.
        """
        leaves = []
        for name, value in self.inputs.items():
            if isinstance(value, torch.Tensor):
                leaves.append(Leaf(name, value, self.axes[name]))
                continue
            names: dict[int, str] = {}
            for index, layer in enumerate(value.layers):
                names |= {id(layer.keys): f"{PAST}{index}.key", id(layer.values): f"{PAST}{index}.value"}
            leaves += [
                Leaf(names[id(tensor)], tensor, ("batch", None, "past_sequence", None), cached=True)
                for tensor in pytree.tree_leaves(value)
            ]
        return leaves


def sample_inputs(source: LoadedModel, with_past: bool) -> Samples:
    """Sample inputs of the task; `with_past` adds a key/value cache.

    Raises:
        ExportError: the model's configuration does not say what it takes.
    """
    if source.task == "image-classification":
        return _images(source)
    if source.task == "audio-classification":
        return _recordings(source)
    samples = _tokens(source)
    if source.task == "text2text-generation":
        _add_decoder_tokens(source, samples)
    if with_past:
        _add_cache(source, samples)
    return samples


def _tokens(source: LoadedModel) -> Samples:
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
    return Samples(
        inputs,
        {name: {0: batch, 1: sequence} for name in names},
        dict.fromkeys(names, ("batch", "sequence")),
    )


def _add_decoder_tokens(source: LoadedModel, samples: Samples) -> None:
    ids = torch.ones(SAMPLE_BATCH, SAMPLE_TARGET, dtype=torch.long)
    target = torch.export.Dim("decoder_sequence", max=source.max_positions)
    samples.inputs["decoder_input_ids"] = ids
    samples.shapes["decoder_input_ids"] = {0: samples.shapes["input_ids"][0], 1: target}
    samples.axes["decoder_input_ids"] = ("batch", "decoder_sequence")


def run_once(source: LoadedModel, inputs: dict[str, Any]) -> Any:
    """What the model makes of its sample inputs.

    Raises:
        ExportError: it cannot be run.
    """
    try:
        with torch.no_grad():
            return source.model(**inputs)
    except Exception as error:  # whatever the model's own code raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(
            f"{source.name} ({source.architecture}) does not run in PyTorch on {', '.join(inputs)}: {reason}"
        ) from error


def keeps_keys_and_values(source: LoadedModel) -> bool:
    """Whether a language model keeps keys and values of every layer while it writes, and nothing else."""
    return _kept(source, _tokens(source).inputs) is not None


def _add_cache(source: LoadedModel, samples: Samples) -> None:
    cache = _sample_cache(source, samples.inputs)
    length = SAMPLE_PAST + SAMPLE_SEQUENCE
    batch, past = samples.shapes["input_ids"][0], torch.export.Dim("past_sequence")
    samples.inputs["attention_mask"] = torch.ones(SAMPLE_BATCH, length, dtype=torch.long)
    argument = _cache_argument(source.model)
    samples.inputs[argument] = cache
    samples.shapes["attention_mask"] = {0: batch, 1: torch.export.Dim.AUTO}
    samples.shapes[argument] = [{0: batch, 2: past} for _ in range(2 * len(cache.layers))]
    samples.axes["attention_mask"] = ("batch", "total_sequence")


def _images(source: LoadedModel) -> Samples:
    """Pictures of the one size the model was made for: a table of positions, or windows, fix it."""
    config = source.config
    size = getattr(config, "image_size", None)
    if size is None:
        raise ExportError(f"{source.name}: its configuration has no image_size, so its input is unknown")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(SAMPLE_BATCH, channels, height, width, generator=generator)
    return Samples(
        {"pixel_values": pixels},
        {"pixel_values": {0: torch.export.Dim("batch")}},
        {"pixel_values": ("batch", None, None, None)},
    )


def _recordings(source: LoadedModel) -> Samples:
    """Raw waveforms; the axis of samples is called `sequence`, like that of tokens."""
    samples = source.min_length + SAMPLE_STRIDES * source.length_unit
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SAMPLE_BATCH, samples, generator=generator)
    # A named axis would have to be a multiple of the stride: the frames are a quotient that rounds down.
    return Samples(
        {"input_values": values},
        {"input_values": {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO}},
        {"input_values": ("batch", "sequence")},
    )


def _normalized(config: Any) -> Any:
    """optimum's view of the configuration; one for any text model where it has none for this type."""
    try:
        return NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        return NormalizedTextConfig(config)


def _cache_argument(model: Any) -> str:
    """What the model calls the cache it takes: `past_key_values`, and since transformers 5.24 `cache`."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _sample_cache(source: LoadedModel, inputs: dict[str, Any]) -> DynamicCache:
    """A cache of `SAMPLE_PAST` positions, its sizes asked of the model.

    Every layer keeps all positions, sliding windows too: the mask is what narrows them.
    """
    kept = _kept(source, inputs)
    assert kept is not None, "asked before"
    cache = DynamicCache()
    for index, pair in enumerate(kept):
        keys, values = (torch.zeros(SAMPLE_BATCH, part.shape[1], SAMPLE_PAST, part.shape[3]) for part in pair)
        cache.update(keys, values, index)
    return cache


def _kept(source: LoadedModel, inputs: dict[str, Any]) -> list[tuple[Any, Any]] | None:
    """Keys and values of every layer as a run leaves them; None where some layer keeps something else (a
    state-space model, one with convolutions)."""
    source.model.config.use_cache = True
    output = run_once(source, inputs)
    filled = [value for value in output.values() if isinstance(value, Cache)]
    kept: list[tuple[Any, Any]] = (
        [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in filled[0].layers]
        if filled
        else []
    )
    whole = all(part is not None and part.ndim == 4 for pair in kept for part in pair)
    return kept if kept and whole else None
