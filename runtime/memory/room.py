"""What the memory budget of the call that runs has left for what comes in: records, images, adapters.

What a file takes is known from its header, so it is refused before any of its content is read. The budget is
that of the thread's present call, so that readers of files need not be handed it through every layer.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

from edgepeft.errors import BudgetError
from edgepeft.sizes import format_size

from .plan import suggested_budget
from .process import read_memory, release_freed_memory

PARSED = 10
"""Bytes that JSON takes for each of its own, while it is parsed and what it says is used."""
SMALL_BYTES = 2**20
"""What takes less is left to the plan of what is done with it, whose refusal says how much that takes."""


class _Limit(NamedTuple):
    budget_bytes: int
    make_room: Callable[[], None]


_limit: ContextVar[_Limit | None] = ContextVar("limit", default=None)


@contextlib.contextmanager
def within(budget_bytes: int | None, make_room: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Read what comes in inside a budget.

    Args:
        budget_bytes: limit on the whole process's resident memory; None for no limit.
        make_room: frees what can be had again, before anything is refused.
    """
    token = _limit.set(None if budget_bytes is None else _Limit(budget_bytes, make_room))
    try:
        yield
    finally:
        _limit.reset(token)


def check_room(wanted_bytes: int, what: str) -> None:
    """Refuse what the budget has no room for.

    Args:
        wanted_bytes: memory that is about to be taken.
        what: takes it.

    Raises:
        BudgetError: it would be too much.
    """
    refusal = no_room(wanted_bytes, what)
    if refusal is not None:
        raise refusal


def no_room(wanted_bytes: int, what: str) -> BudgetError | None:
    """The error that `check_room` raises; None where there is room, or where plans have enough to spare."""
    limit = _limit.get()
    if limit is None or wanted_bytes < SMALL_BYTES:
        return None
    budget_bytes = limit.budget_bytes
    held_bytes = read_memory().resident_bytes
    for free in (release_freed_memory, limit.make_room):
        if held_bytes + wanted_bytes > budget_bytes:
            free()
            held_bytes = read_memory().resident_bytes
    if held_bytes + wanted_bytes <= budget_bytes:
        return None
    required_bytes = suggested_budget(held_bytes + wanted_bytes)
    return BudgetError(
        f"{what} takes {format_size(wanted_bytes)} of memory, the process holds {format_size(held_bytes)} "
        f"and the budget is {format_size(budget_bytes)}: give --budget {required_bytes // 2**20}MiB at "
        "least, or something smaller",
        budget_bytes=budget_bytes,
        required_bytes=required_bytes,
    )
