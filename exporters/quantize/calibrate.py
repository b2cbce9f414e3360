"""Calibration: run records through the model and quantize each linear for what it reads.

Linears that read the same value are a group. Groups go in the order in which the model runs them, and each
sees what the quantized layers before it make, beside what the float model makes, so that it can make up for
their errors (`gptq`). For each group the records run through both models once, up to the group; of repeated
blocks that are done, the last one's outputs are kept, so that such a pass is little more than one block's
work.
"""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from .blockwise import can_quantize, quantize
from .gptq import InputStatistics, gptq
from .layouts import QuantizedWeight

Feeds = dict[str, torch.Tensor]
#: Of an embedding that is no output layer as well: what it loses, no layer can make up for, and a token reads
#: one row of it.
EMBEDDING_BITS = 8
#: Is told how many weights of how many are done.
Progress = Callable[[int, int], None]


def calibrate(
    model: Any,
    feeds: Sequence[Feeds],
    *,
    bits: int,
    block_size: int,
    kept: Collection[str] = (),
    progress: Progress = lambda _done, _total: None,
) -> dict[str, QuantizedWeight]:
    """Quantize the linears that `model` calls, but for one that is an embedding as well, and at 4 bits the
    largest embedding, to `EMBEDDING_BITS`.

    It takes as many runs of the records through both models as there are groups in a block (four, as a rule)
    and one; or, in a model without blocks that feed one another, groups in all. Needs memory for a copy of
    the model, what a block returns for all records from both of them, and some matrices `[in_features,
    in_features]` of the widest linear.

    Args:
        model: a transformers model in evaluation mode; its weights are left as they are.
        feeds: its keyword arguments, one record each, without padding.
        bits: 4 or 8.
        block_size: weights that share a scale.
        kept: modules that stay floats.
        progress: see `Progress`.

    Returns:
        The quantized weights by state-dict key, `[out_features, in_features]`. What the first record does not
        reach, or reaches with zeros only, is not among them.
    """
    model.config.use_cache = False
    rounded = copy.deepcopy(model)
    found: dict[str, QuantizedWeight] = {}
    with torch.no_grad():
        found |= _round_largest_embedding(rounded, bits, block_size)
        plan = _plan(model, feeds[0], _calibrated(model, block_size, kept))
        exact, quantized = (_Passes(side, feeds, plan.blocks) for side in (model, rounded))
        total = len(found) + sum(len(group.modules) for group in plan.groups)
        for group in plan.groups:
            progress(len(found), total)
            weights = [_weight(model.get_submodule(name)) for name in group.modules]
            halves = InputStatistics.empty(weights[0].shape[1]), InputStatistics.empty(weights[0].shape[1])
            read = zip(exact.inputs(group), quantized.inputs(group), strict=True)
            for half, (rows, quantized_rows) in zip(itertools.cycle(halves), read, strict=False):
                half.add(rows, quantized_rows)
            if not any(half.hessian.any() for half in halves):  # any rounding is as good
                continue
            for name, weight in zip(group.modules, gptq(weights, halves, bits, block_size), strict=True):
                found[f"{name}.weight"] = weight
                _weight(rounded.get_submodule(name)).copy_(weight.dequantize())
        progress(total, total)
    return found


def _weight(linear: Any) -> torch.Tensor:
    """A view `[out_features, in_features]` of a linear's weight."""
    weight: torch.Tensor = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def _calibrated(model: torch.nn.Module, block_size: int, kept: Collection[str]) -> list[str]:
    """Names of the linears whose weights are to be quantized for their inputs.

    An output layer that is the embedding too is rounded like an embedding: its rows are also looked up.
    """
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


def _round_largest_embedding(
    model: torch.nn.Module, bits: int, block_size: int
) -> dict[str, QuantizedWeight]:
    """Round the embedding that `Freezer` will quantize; return it where its bits are other than `bits`."""
    tables = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)}
    largest = max(tables, key=lambda name: tables[name].weight.numel(), default=None)
    if largest is None or not can_quantize(tables[largest].weight.shape[1], block_size):
        return {}
    weight = tables[largest].weight
    products = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    stored = bits if id(weight) in products else EMBEDDING_BITS
    quantized = quantize(weight, stored, block_size)
    weight.copy_(quantized.dequantize())
    return {} if stored == bits else {f"{largest}.weight": quantized}


@dataclass(frozen=True)
class _Group:
    """Linears that read the same values.

    Attributes:
        modules: their names.
        calls: how often a run calls each.
        after: blocks that have returned when it does so first.
    """

    modules: list[str]
    calls: int
    after: int


@dataclass(frozen=True)
class _Plan:
    """Groups in the order of a run, and names of blocks that feed one another (none if there are no such)."""

    groups: list[_Group]
    blocks: list[str]


def _plan(model: Any, feeds: Feeds, linears: Collection[str]) -> _Plan:
    """Run one record and look what is called."""
    blocks = _largest_list(model)
    read: dict[str, list[torch.Tensor]] = {}
    firsts: dict[str, int] = {}
    returned: list[Any] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        if args:
            read.setdefault(name, []).append(args[0])  # kept, so that no other tensor gets its identity
            firsts.setdefault(name, len(returned))

    with ExitStack() as hooks:
        for name in linears:
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
            hooks.callback(hook.remove)
        for name in blocks:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(lambda *call: returned.append(call[-1])).remove)
        output = model(**feeds)[0]
    if not _can_replay(model, feeds, blocks, returned, output):
        blocks = []
    members: dict[tuple[int, ...], list[str]] = {}
    for name, values in read.items():
        members.setdefault(tuple(map(id, values)), []).append(name)
    return _Plan(
        [_Group(names, len(values), firsts[names[0]] if blocks else 0) for values, names in members.items()],
        blocks,
    )


def _largest_list(model: torch.nn.Module) -> list[str]:
    """Names of the members of the list of modules with most weights: a model's repeated blocks."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    largest = max(
        lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()), default=None
    )
    return [] if largest is None else [f"{largest}.{index}" for index in range(len(lists[largest]))]


def _can_replay(
    model: Any, feeds: Feeds, blocks: Sequence[str], returned: Sequence[Any], output: torch.Tensor
) -> bool:
    """Whether each block is called once, and the last one needs nothing of the others but what the one before
    it returned: then it computes the same when that is all they do."""
    if len(blocks) < 2 or len(returned) != len(blocks):
        return False
    with _replaced(model, blocks[:-1], returned[-2]):
        try:
            return torch.equal(model(**feeds)[0], output)
        except Exception:  # whatever the model's own code raises when blocks return something else
            return False


@contextmanager
def _replaced(model: torch.nn.Module, blocks: Sequence[str], output: Any) -> Iterator[None]:
    """Let blocks return `output` at once."""
    modules: list[Any] = [model.get_submodule(name) for name in blocks]
    for module in modules:
        module.forward = lambda *_args, **_options: output
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _ReachedError(Exception):
    """A run has come as far as it has to."""


@dataclass
class _Passes:
    """Runs of all records, each up to some linear, through one model.

    The first `done` blocks do not run any more: `outputs` has what the last of them returned, by record.
    """

    model: Any
    feeds: Sequence[Feeds]
    blocks: Sequence[str]
    done: int = 0
    outputs: list[Any] = field(default_factory=list)

    def inputs(self, group: _Group) -> Iterator[torch.Tensor]:
        """Yield what the group reads in each record, float32 `[rows, in_features]`, its calls one below the
        other."""
        seen: list[torch.Tensor] = []
        fresh: list[Any] = []

        def read(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].reshape(-1, args[0].shape[-1]))
            if len(seen) == group.calls:
                raise _ReachedError

        with ExitStack() as hooks:
            linear = self.model.get_submodule(group.modules[0])
            hooks.callback(linear.register_forward_pre_hook(read).remove)
            if group.after > self.done:
                last = self.model.get_submodule(self.blocks[group.after - 1])
                hook = last.register_forward_hook(lambda *call: fresh.append(call[-1]))
                hooks.callback(hook.remove)
            for number, feeds in enumerate(self.feeds):
                seen.clear()
                output = self.outputs[number] if self.done else None
                with suppress(_ReachedError), _replaced(self.model, self.blocks[: self.done], output):
                    self.model(**feeds)
                yield torch.cat(seen)
        if fresh:
            self.done, self.outputs = group.after, fresh
