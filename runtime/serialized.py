"""One call at a time, whatever the thread, and what it reads inside its budget."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from edgepeft.runtime.memory.room import within

Method = TypeVar("Method", bound=Callable[..., Any])


def one_at_a_time(method: Method) -> Method:
    """A method that waits until no other thread is in one of the object's methods; it may call others.

    The object has an `RLock` in its attribute `_lock`, and a budget for what its calls read, or None, in
    `_budget_bytes`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock, within(self._budget_bytes):
            return method(self, *args, **kwargs)

    return cast(Method, call)
