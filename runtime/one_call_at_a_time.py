"""One call at a time, whatever the thread, and what it reads inside its budget."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


def one_at_a_time(method: Method) -> Method:
    """A method that waits until no other thread is in one of the object's methods; it may call others.

    The object has an `RLock` in its attribute `_lock`, and its method `_reading` makes the context that calls
    read in.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock, self._reading():
            return method(self, *args, **kwargs)

    return cast(Method, call)
