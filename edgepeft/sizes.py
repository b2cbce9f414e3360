"""Byte sizes as people write them, `96MiB`, `128MB`, `0.5GiB`, `1048576`, and shares, `25%`."""

import re
from decimal import Decimal

from .errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# Digits are bounded so that a hostile argument costs no time, and ASCII because \d would take other scripts'
# digits.
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")
_SHARE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(%?)")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `96MiB` (2**20), `128MB` (10**6), `0.5GiB` or a plain number of bytes.

    Args:
        text: the size; units are read without regard to case, an integer is taken as bytes.

    Raises:
        UsageError: the text is not a size, or the size is below one byte.
    """
    if isinstance(text, bool):
        raise UsageError(f"{text!r} is not a size: write a number and a unit, such as 96MiB, 128MB or 0.5GiB")
    match = _SIZE.fullmatch(str(text).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is not None and (letter := match[2].upper()) in ("K", "M", "G", "T"):
        raise UsageError(
            f"{text!r} is not a size: {match[2]} means two things, write {match[1]}{letter}iB (powers of "
            f"1024) or {match[1]}{letter}B (powers of 1000)"
        )
    if match is None or unit is None:
        raise UsageError(f"{text!r} is not a size: write a number and a unit, such as 96MiB, 128MB or 0.5GiB")
    size_bytes = int(Decimal(match[1]) * unit)
    if size_bytes < 1:
        raise UsageError(f"{text!r} is no memory at all: write a size of at least one byte, such as 96MiB")
    return size_bytes


def parse_share(text: str | float) -> float:
    """A part of a whole such as `25%` or 0.25, between 0 and 1.

    Raises:
        UsageError: the text is no such number, or none between 0 and 1.
    """
    match = _SHARE.fullmatch(str(text).strip())
    share = 0.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0 < share < 1:
        raise UsageError(f"{text!r} is no share: write a number above 0 and below 1, such as 25% or 0.25")
    return share


def format_size(size_bytes: float) -> str:
    """A size for people, in binary units: `512 B`, `96.0 MiB`, `1.25 GiB`."""
    if abs(size_bytes) < 2**10:
        return f"{int(size_bytes)} B"
    for unit, scale, digits in (("KiB", 2**10, 1), ("MiB", 2**20, 1), ("GiB", 2**30, 2)):
        if abs(size_bytes) < scale * 2**10 or unit == "GiB":
            return f"{size_bytes / scale:.{digits}f} {unit}"
    raise AssertionError("unreachable")
