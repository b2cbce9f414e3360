"""One call at a time, whatever the thread."""

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Locked(Protocol):
    """Something with a lock."""

    _lock: threading.RLock


Self_ = TypeVar("Self_", bound=Locked)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def one_at_a_time(
    method: Callable[Concatenate[Self_, Parameters], Result],
) -> Callable[Concatenate[Self_, Parameters], Result]:
    """A method that waits until no other thread is in one of the object's methods; it may call others."""

    @functools.wraps(method)
    def call(self: Self_, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with self._lock:
            return method(self, *args, **kwargs)

    return call
