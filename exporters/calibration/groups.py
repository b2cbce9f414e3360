"""Which linears read the same values, in which order a model runs them, and which of its blocks can be left
out once what they return is known."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Feeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
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
class Plan:
    """Groups in the order of a run, and names of blocks that feed one another (none if there are no such)."""

    groups: list[Group]
    blocks: list[str]


def plan(model: Any, feeds: Feeds, linears: Collection[str]) -> Plan:
    """Run one record and look which of the linears are called, and when."""
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
    return Plan(
        [Group(names, len(values), firsts[names[0]] if blocks else 0) for values, names in members.items()],
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
    with replaced(model, blocks[:-1], returned[-2]):
        try:
            return torch.equal(model(**feeds)[0], output)
        except Exception:  # whatever the model's own code raises when blocks return something else
            return False


@contextmanager
def replaced(model: torch.nn.Module, blocks: Sequence[str], output: Any) -> Iterator[None]:
    """Let blocks return `output` at once."""
    modules: list[Any] = [model.get_submodule(name) for name in blocks]
    for module in modules:
        module.forward = lambda *_args, **_options: output
    try:
        yield
    finally:
        for module in modules:
            del module.forward
