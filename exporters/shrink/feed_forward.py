"""The feed-forward layers of a model, found by what they compute, and made narrower.

A layer is a linear that reads `channels`, and the one or two linears that make these (`fc1`; `gate` and `up`,
apart or as one). Channels can be removed where each of them is made of its own rows alone. That is tried:
other rows for half of the channels must leave the other half as it was, which they do not where attention or
a norm stands in between.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from edgepeft.errors import ExportError

from ..calibration.groups import Feeds, Group, plan
from ..calibration.passes import ReachedError
from ..scratch import spooled
from ..sources.quiet import quiet

#: What configurations call the width of their feed-forward layers.
_WIDTHS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"),
    "n_inner",
)
#: Of the largest value that a linear reads, what rounding may change.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer.

    Attributes:
        producers: names of the linears that make the channels, each with one row or two of each channel.
        consumer: name of the linear that reads them.
        channels: how many there are.
        group: when a run of the model calls the consumer.
    """

    producers: tuple[str, ...]
    consumer: str
    channels: int
    group: Group


def feed_forwards(model: Any, feeds: Feeds) -> tuple[list[FeedForward], list[str]]:
    """A model's feed-forward layers in the order in which it runs them, and names of its blocks, as
    `groups.Plan` has them.

    Args:
        model: a transformers model in evaluation mode.
        feeds: its keyword arguments for a few records.

    Raises:
        ExportError: its configuration has their width for other linears, too.
    """
    one = {name: tensor[:1] for name, tensor in feeds.items()}
    found, separate = list[FeedForward](), dict[object, bool]()
    with torch.no_grad():
        planned = plan(model, one, _linears(model))
        for place, group in enumerate(planned.groups):
            consumer = group.modules[0]
            channels = matrix(model, consumer).shape[1]
            producers = _producers(model, planned.groups[:place], channels)
            if len(group.modules) > 1 or not producers:
                continue
            # What has the same names and sizes in another block is the same layer.
            kind = tuple((re.sub(r"\d+", "#", name), matrix(model, name).shape) for name in producers)
            key = (kind, re.sub(r"\d+", "#", consumer))
            if key not in separate:
                separate[key] = _are_separate(model, one, producers, consumer, channels)
            if separate[key]:
                found.append(FeedForward(producers, consumer, channels, group))
    return _configured(model, found), planned.blocks


def matrix(model: Any, linear: str) -> torch.Tensor:
    """A view `[out_features, in_features]` of a linear's weight."""
    module = model.get_submodule(linear)
    weight: torch.Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def set_linear(model: Any, linear: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a linear another weight, float32 `[out_features, in_features]`, and bias (None: it has none)."""
    module = model.get_submodule(linear)
    turned = isinstance(module, Conv1D)
    stored = (weight.T if turned else weight).contiguous()
    stored = spooled(stored.shape, stored.dtype, (stored,))
    module.weight = torch.nn.Parameter(stored, requires_grad=False)
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    for name, size in zip(
        ("nf", "nx") if turned else ("out_features", "in_features"), weight.shape, strict=True
    ):
        setattr(module, name, size)


def rows_of(channels: torch.Tensor, layer: FeedForward, out_features: int) -> torch.Tensor:
    """The rows of a producer that make `channels`, int64."""
    starts = range(0, out_features, layer.channels)
    return torch.cat([channels + start for start in starts])


def resize(config: Any, kept: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """Write new widths of feed-forward layers into a transformers configuration.

    Args:
        config: is changed.
        kept: new widths by the old ones.

    Returns:
        The old and the new width by the configuration's names.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for part in {id(found): found for found in (config, config.get_text_config())}.values():
        for name in _WIDTHS:
            width = getattr(part, name, 0)
            if width is None and name == "n_inner":
                width = 4 * part.hidden_size
            if width in kept:
                sizes[name] = (width, kept[width])
                setattr(part, name, kept[width])
    return sizes


def _configured(model: Any, layers: Sequence[FeedForward]) -> list[FeedForward]:
    """Those layers whose width the model's configuration says: transformers can make them narrower, and the
    layer before a classifier, which looks the same, is none of them.

    Raises:
        ExportError: others would be narrower, too.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    config = copy.deepcopy(base.config)
    halves = {layer.channels: layer.channels // 2 for layer in layers}
    resize(config, halves)
    try:
        with torch.device("meta"), quiet():
            made: Any = type(base)(config)
    except Exception as error:  # whatever the model's own code raises
        raise ExportError(
            f"--prune: transformers makes no {type(base).__name__} with narrower layers ({error}): leave "
            "--prune out"
        ) from error
    narrower = {f"{prefix}{name}": matrix(made, name).shape for name in _linears(made)}
    found, own = list[FeedForward](), set[str]()
    for layer in layers:
        half = halves[layer.channels]
        shapes = {
            name: (len(weight) // layer.channels * half, weight.shape[1])
            for name in layer.producers
            for weight in [matrix(model, name)]
        }
        shapes[layer.consumer] = (len(matrix(model, layer.consumer)), half)
        if all(narrower.get(name) == shape for name, shape in shapes.items()):
            found.append(layer)
            own |= shapes.keys()
    for name in _linears(model):
        if name not in own and name in narrower and narrower[name] != matrix(model, name).shape:
            raise ExportError(
                f"--prune: {name} is as wide as the feed-forward layers of {type(model).__name__} and none "
                "that edgepeft knows and a record reaches: leave --prune out"
            )
    return found


def _linears(model: torch.nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)]


def _producers(model: Any, groups: Sequence[Group], channels: int) -> tuple[str, ...]:
    """Of the linears that ran last and have a row, or two, for each channel, those that read the same."""
    for group in reversed(groups):
        found = tuple(name for name in group.modules if len(matrix(model, name)) in (channels, 2 * channels))
        if found:
            return found
    return ()


def _are_separate(model: Any, feeds: Feeds, producers: Sequence[str], consumer: str, channels: int) -> bool:
    """Whether other rows for half of the channels change that half of what the consumer reads, and nothing
    else of it."""
    half = torch.arange(channels) % 2 == 0
    generator = torch.Generator().manual_seed(0)
    before = _read(model, feeds, consumer)
    with ExitStack() as stack:
        for name in producers:
            module, weight = model.get_submodule(name), matrix(model, name)
            other = torch.randn(weight.shape, generator=generator) * weight.std()
            rows = half.repeat(len(weight) // channels)[:, None]
            changed = torch.where(rows, other, weight)
            stack.callback(setattr, module, "weight", module.weight)
            module.weight = torch.nn.Parameter(
                changed.T.contiguous() if isinstance(module, Conv1D) else changed, requires_grad=False
            )
        change = (_read(model, feeds, consumer) - before).abs().amax(0)
    least = _ROUNDING * float(before.abs().max())
    return bool((change[~half] <= least).all() and (change[half] > least).any())


def _read(model: Any, feeds: Feeds, linear: str) -> torch.Tensor:
    """What a linear reads first, float32 `[rows, in_features]`."""
    seen: list[torch.Tensor] = []

    def read(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]))
        raise ReachedError

    with ExitStack() as hooks, suppress(ReachedError):
        hooks.callback(model.get_submodule(linear).register_forward_pre_hook(read).remove)
        model(**feeds)
    return seen[0]
