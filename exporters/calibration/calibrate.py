"""Calibration: run records through the model and quantize each linear for what it reads.

Linears that read the same value are a group. Groups go in the order in which the model runs them, and each
sees what the quantized layers before it make, beside what the float model makes, so that it can make up for
their errors (`gptq`). For each group the records run through both models once, up to the group; of repeated
blocks that are done, the last one's outputs are kept, so that such a pass is little more than one block's
work.

Before that one backward pass says which weights are better kept at 8 bits (`sensitivity`), within the bytes
that the model may take, and the output layer is rounded, if it is the embedding as well: every layer reads
what is looked up there.
"""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from edgepeft.errors import UsageError

from ..quantize.blockwise import can_quantize, quantize, stored_bytes
from ..quantize.gptq import InputStatistics, gptq
from ..quantize.layouts import QuantizedWeight
from ..sources.tied_weights import canonical_names
from .allocate import Choice, allocate
from .groups import Feeds, Group, plan
from .passes import Passes, ReachedError, fast_products
from .sensitivity import sensitivities

#: Is told how many weights of how many are done.
Progress = Callable[[int, int], None]
#: Tokens (rows of an output) that sensitivities are measured on, and those that an output layer is rounded
#: for.
_MEASURED_ROWS, _HEAD_ROWS = 512, 8192


@dataclass(frozen=True)
class Calibrated:
    """What came of it.

    Attributes:
        weights: the quantized ones by state-dict key, `[out_features, in_features]`. What the first record
            does not reach, or reaches with zeros only, is not among them.
        errors: by key, of what a linear makes of the records the fraction that is lost, as
            `manifest.Calibration` has it.
    """

    weights: dict[str, QuantizedWeight]
    errors: dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """How weights are to be stored.

    Attributes:
        bits: 4 or 8; at 4 bits some have 8, as many as `size_bytes` allow.
        block_size: weights that share a scale.
        size_bytes: of all quantized weights together; None: 4 bits and two scales of 16 bits a block, 5 bits
            a weight in blocks of 32.
    """

    bits: int
    block_size: int
    size_bytes: int | None = None


def calibrate(
    model: Any,
    feeds: Sequence[Feeds],
    sizes: Sizes,
    *,
    kept: Collection[str] = (),
    seed: int = 0,
    progress: Progress = lambda _done, _total: None,
) -> Calibrated:
    """Quantize the linears that `model` calls, and the largest embedding.

    It takes as many runs of the records through both models as there are groups in a block (four, as a rule)
    and one; or, in a model without blocks that feed one another, groups in all. Needs memory for one block
    more than the model's, what a block returns for all records from both of them, and some matrices
    `[in_features, in_features]` of the widest linear.

    Args:
        model: a transformers model in evaluation mode; its weights are left as they are.
        feeds: its keyword arguments, one or several records each, without padding.
        sizes: how weights are to be stored.
        kept: modules that stay floats.
        seed: of what is drawn to find out which weights matter.
        progress: see `Progress`.

    Raises:
        UsageError: `size_bytes` are too few.
    """
    model.config.use_cache = False
    table = _largest_embedding(model, sizes.block_size)
    rounded = _sharing(model)
    with torch.no_grad():
        planned = plan(model, feeds[0], _calibrated(model, sizes.block_size, kept))
        linears = [name for group in planned.groups for name in group.modules]
        names = linears if table is None else [table, *linears]
        if not names:
            return Calibrated({}, {})
        bits = _bits(model, feeds, names, sizes, seed)
        found, errors = dict[str, QuantizedWeight](), dict[str, float]()
        if table is not None:
            found[f"{table}.weight"] = _rounded_table(model, feeds, table, bits[table], sizes.block_size)
            _write(rounded, table, found[f"{table}.weight"])
        exact, quantized = (Passes(side, feeds, planned.blocks) for side in (model, rounded))
        for group in planned.groups:
            progress(len(found), len(names))
            halves = _statistics(exact, quantized, group)
            if not any(half.hessian.any() for half in halves):  # any rounding is as good
                continue
            weights = [_weight(model.get_submodule(name)) for name in group.modules]
            results = gptq(weights, halves, [bits[name] for name in group.modules], sizes.block_size)
            hessian = halves[0].hessian + halves[1].hessian
            for name, weight, result in zip(group.modules, weights, results, strict=True):
                found[f"{name}.weight"] = result
                errors[f"{name}.weight"] = _error(weight, result, hessian)
                _write(rounded, name, result)
            for block in planned.blocks[: quantized.done]:  # they do not run any more
                _share(model, rounded, block)
        progress(len(names), len(names))
    names_of = canonical_names(model)  # a tied embedding goes by its output layer's
    return Calibrated({names_of[key]: weight for key, weight in found.items()}, errors)


def _sharing(model: Any) -> Any:
    """A copy of the model of the same weights, not of copies."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _write(model: Any, name: str, weight: QuantizedWeight) -> None:
    """Let a module of the model compute with what it was rounded to, which no other model sees."""
    module = model.get_submodule(name)
    values = weight.dequantize()
    values = values.T if isinstance(module, Conv1D) else values
    module.weight = torch.nn.Parameter(values, requires_grad=False)


def _share(model: Any, other: Any, block: str) -> None:
    """Give a block of `other` the weights of the model again."""
    weights = dict(model.get_submodule(block).named_parameters())
    for name in weights:
        owner, _, key = name.rpartition(".")
        setattr(other.get_submodule(f"{block}.{owner}" if owner else block), key, weights[name])


def _statistics(exact: Passes, quantized: Passes, group: Group) -> tuple[InputStatistics, InputStatistics]:
    """What a group reads in the even records and in the odd ones."""
    halves: list[InputStatistics] = []
    read = zip(exact.inputs(group), quantized.inputs(group), strict=True)
    for number, (rows, quantized_rows) in enumerate(read):
        if not halves:
            halves = [InputStatistics.empty(rows.shape[1]) for _ in range(2)]
        halves[number % 2].add(rows, quantized_rows)
    return halves[0], halves[1]


def _error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """Of the root of the mean square of what a linear makes, the fraction that rounding changes."""
    difference = quantized.dequantize().sub_(weight)
    lost, made = (float(((one @ hessian) * one).sum()) for one in (difference, weight))
    return (lost / made) ** 0.5 if made > 0 else 0.0


def _weight(linear: Any) -> torch.Tensor:
    """A view `[out_features, in_features]` of a linear's weight."""
    weight: torch.Tensor = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def _calibrated(model: torch.nn.Module, block_size: int, kept: Collection[str]) -> list[str]:
    """Names of the linears whose weights are to be quantized for their inputs; one that is an embedding too
    goes with those."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    floats = tuple(f"{name}." for name in kept)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and can_quantize(_weight(module).shape[1], block_size)
        and id(module.weight) not in looked_up
        and not f"{name}.".startswith(floats)
    ]


def _largest_embedding(model: torch.nn.Module, block_size: int) -> str | None:
    """Name of the embedding that `Freezer` will quantize."""
    tables: dict[str, torch.nn.Embedding] = {
        name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)
    }
    largest = max(tables, key=lambda name: tables[name].weight.numel(), default=None)
    fits = largest is not None and can_quantize(tables[largest].weight.shape[1], block_size)
    return largest if fits else None


def _products_of(model: torch.nn.Module, table: str) -> list[str]:
    """Names of the linears that share an embedding's weight."""
    weight = model.get_submodule(table).weight
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight is weight
    ]


def _bits(
    model: Any, feeds: Sequence[Feeds], names: Sequence[str], sizes: Sizes, seed: int
) -> dict[str, int]:
    """Bits of each weight."""
    if sizes.bits == 8:
        return dict.fromkeys(names, 8)
    shapes: dict[str, tuple[int, int]] = {
        name: (rows, columns)
        for name in names
        for rows, columns in [_weight(model.get_submodule(name)).shape]
    }
    measured: list[Feeds] = []
    rows = 0
    for record in _records(feeds):  # one by one: logits of many tokens take much memory
        measured.append(record)
        rows += next(iter(record.values())).numel()
        if rows >= _MEASURED_ROWS:
            break
    tables = (name for name in names if isinstance(model.get_submodule(name), torch.nn.Embedding))
    tied = [product for table in tables for product in _products_of(model, table)]
    losses = sensitivities(
        model,
        measured,
        [*names, *tied],
        lambda weight, importance: quantize(weight, 4, sizes.block_size, importance),
        seed,
    )
    choices = {
        name: Choice(
            stored_bytes(*shape, 4, sizes.block_size),
            stored_bytes(*shape, 8, sizes.block_size),
            losses.get(name, 0.0),
        )
        for name, shape in shapes.items()
    }
    size_bytes = sizes.size_bytes
    if size_bytes is None:
        weights = sum(rows * columns for rows, columns in shapes.values())
        size_bytes = int(weights * (4 + 32 / sizes.block_size) / 8)
    least_bytes = sum(choice.bytes_4 for choice in choices.values())
    if sizes.size_bytes is not None and size_bytes < least_bytes:
        raise UsageError(
            f"--size {size_bytes / 1e6:.1f} MB: the weights take at least {least_bytes / 1e6:.1f} MB, all "
            "with 4 bits: give at least that, or choose a larger --block-size"
        )
    return allocate(choices, size_bytes)


def _records(feeds: Sequence[Feeds]) -> Iterator[Feeds]:
    """Each record alone."""
    for each in feeds:
        for parts in zip(*(tensor.split(1) for tensor in each.values()), strict=True):
            yield dict(zip(each, parts, strict=True))


def _rounded_table(
    model: Any, feeds: Sequence[Feeds], table: str, bits: int, block_size: int
) -> QuantizedWeight:
    """An embedding, rounded for what it is multiplied with where it is an output layer, too.

    Its rows are also looked up: that wants them near as they are, so the identity is added to the Hessian,
    whose diagonal is brought to 1.
    """
    weight = model.get_submodule(table).weight
    products = _products_of(model, table)
    if bits == 8 or not products:
        return quantize(weight, bits, block_size)
    nothing = InputStatistics.empty(weight.shape[1])
    hessian, rows = torch.zeros_like(nothing.hessian), 0

    def read(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        x = args[0].reshape(-1, len(hessian)).float()
        hessian.addmm_(x.T, x)
        rows += len(x)
        raise ReachedError

    with ExitStack() as hooks:
        hooks.callback(model.get_submodule(products[0]).register_forward_pre_hook(read).remove)
        for each in feeds:
            with suppress(ReachedError), fast_products():
                model(**each)
            if rows >= _HEAD_ROWS:
                break
    if not hessian.any():
        return quantize(weight, bits, block_size)
    hessian /= hessian.diagonal().mean()
    hessian.diagonal().add_(1)
    exact = InputStatistics(hessian, nothing.shift)  # nothing is quantized before it
    (found,) = gptq([weight], (exact, nothing), [bits], block_size)
    return found
