"""A mapped file that becomes shorter, or whose disk is gone: the system sends SIGBUS to who reads it then.

Python's own handlers run when the interrupted instruction is done, which this one never is. So the handler is
given to the C library, and ends the process.
"""

import os
import signal
from typing import Any

from ..errors import EdgePeftError
from .console import Console

_kept: list[Any] = []  # what the C library calls has to stay


def tell_bus_errors(console: Console) -> None:
    """Have a SIGBUS end the process with one line and exit code 1; nothing where there is none (Windows)."""
    number = getattr(signal, "SIGBUS", None)
    if number is None:
        return
    import ctypes

    def told(_: int) -> None:
        error = EdgePeftError(
            "a mapped file, such as a bundle's weights, was cut off or its disk is gone (SIGBUS): copy the "
            "bundle again; a checkpoint that was written stays"
        )
        try:
            os._exit(console.fail(error))
        finally:
            os._exit(1)

    try:
        install = ctypes.CDLL(None).signal
    except (OSError, TypeError, AttributeError):
        return
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(told)
    _kept.append(handler)
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(number, ctypes.cast(handler, ctypes.c_void_p))
