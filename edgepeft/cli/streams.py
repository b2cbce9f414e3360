"""Standard input and output with every character, whatever encoding a system has for them.

On Windows what is no terminal has one of the old code pages, which most of the world's characters are not in.
"""

import io
import sys

from ..errors import UsageError


def take_every_character() -> None:
    """Have output to files and pipes in UTF-8; what a terminal's encoding has not is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def read_standard_input() -> str:
    """All of it: UTF-8, with or without a byte order mark.

    Raises:
        UsageError: it is something else.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text ({error}): convert it first") from error
