"""What torch does beside a trace, left out while it traces."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: New objects between two collections: a trace makes millions that stay, and torch's modules are among what
#: each full collection looks at.
_OBJECTS = 100_000


@contextmanager
def quick_trace() -> Iterator[None]:
    """Look for circles of garbage less often, and note no line of Python for every node, which no bundle has:
    a tenth of a language model's trace."""
    # torch before 2.13 has no such setting.
    config: Any = getattr(torch.fx, "config", None)
    thresholds = gc.get_threshold()
    traces = getattr(config, "do_not_emit_stack_traces", None)
    gc.set_threshold(_OBJECTS, *thresholds[1:])
    if traces is not None:
        config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if traces is not None:
            config.do_not_emit_stack_traces = traces
