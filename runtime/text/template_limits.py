"""Limits on the time and the memory that a chat template takes, a program of whoever made the bundle.

Jinja's sandbox keeps a template from the rest of the process, and lets it loop for years and make texts of
gigabytes. Time is looked at line by line, in a trace function; memory is the system's to limit (Linux), and
products and powers, the shortest way to much of it, are looked at everywhere.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgepeft.errors import BundleError

from ..memory.system import memory_limit

LIMIT_S = 4.0
"""Seconds of computing."""
_MEMORY_BYTES = 2**26
_MOST_ITEMS = 2**22
_MOST_BITS = 2**10
_LINES = 100
"""Between two looks at the clock."""


class _TakesTooLong(BaseException):
    """No `Exception`, because Jinja catches these where it computes constants."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with numbers, and products of texts and lists, of bounded size."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See `SandboxedEnvironment`.

        Raises:
            OverflowError: the result would be too large.
        """
        sizes = [len(side) if isinstance(side, str | list | tuple) else None for side in (left, right)]
        bits = [side.bit_length() if isinstance(side, int) else 0 for side in (left, right)]
        if operator == "**" and isinstance(right, int):
            too_large = bits[0] * abs(right) > _MOST_BITS if bits[1] <= 32 else True
        elif sizes == [None, None]:
            too_large = sum(bits) > _MOST_BITS
        else:
            count, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            too_large = isinstance(times, int) and (count or 0) * times > _MOST_ITEMS
        if too_large:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def limited(origin: str) -> Iterator[None]:
    """Have what the block computes take no more than `LIMIT_S` and, on Linux, 64 MiB.

    Args:
        origin: the template's file, for the message.

    Raises:
        BundleError: it takes more.
    """
    end_s, lines = time.thread_time() + LIMIT_S, 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        del frame, event, argument
        lines += 1
        if lines % _LINES == 0 and time.thread_time() > end_s:
            raise _TakesTooLong
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with memory_limit(_MEMORY_BYTES):
            yield
    except _TakesTooLong:
        raise BundleError(
            f"{origin}: the chat template computes for more than {LIMIT_S:.0f} s: do not trust it"
        ) from None
    except MemoryError as error:
        raise BundleError(
            f"{origin}: the chat template takes more than {_MEMORY_BYTES // 2**20} MiB: do not trust it"
        ) from error
    finally:
        sys.settrace(before)
