"""Runs of all records, each up to some linear.

Where the processor multiplies bfloat16 in hardware, runs are made in it: five times as fast, and what layers
read is then known to three digits, which is more than a sum over thousands of tokens has.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from .groups import Feeds, Group, replaced


class ReachedError(Exception):
    """A run has come as far as it has to."""


def fast_products(*, cache_enabled: bool = False) -> torch.autocast:
    """A context in which linears are computed in bfloat16, where the processor is built for that;
    `cache_enabled` keeps the weights as such until it is left."""
    # One that computes it by float32 is slower for it, which is what torch's own question answers yes to.
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.autocast("cpu", torch.bfloat16, enabled=supported, cache_enabled=cache_enabled)


@contextmanager
def requiring_gradients(model: Any, required: bool) -> Iterator[None]:
    """Let all weights of a model require gradients, or none."""
    with ExitStack() as stack:
        for weight in model.parameters():
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(required)
        yield


@dataclass
class Passes:
    """Runs of all records, each up to some linear, through one model.

    The first `done` blocks do not run any more: `outputs` has what the last of them returned, by record.
    """

    model: Any
    feeds: Sequence[Feeds]
    blocks: Sequence[str]
    done: int = 0
    outputs: list[Any] = field(default_factory=list)

    def inputs(self, group: Group) -> Iterator[torch.Tensor]:
        """Yield what the group reads in each record, float32 `[rows, in_features]`, its calls one below the
        other."""
        seen: list[torch.Tensor] = []
        fresh: list[Any] = []

        def read(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].reshape(-1, args[0].shape[-1]).float())
            if len(seen) == group.calls:
                raise ReachedError

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
                with (
                    suppress(ReachedError),
                    fast_products(),
                    replaced(self.model, self.blocks[: self.done], output),
                ):
                    self.model(**feeds)
                yield torch.cat(seen)
        if fresh:
            self.done, self.outputs = group.after, fresh
