"""Which weights have 8 bits, so that as little as possible is lost in so many bytes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A weight that can have 4 or 8 bits: what it takes either way, and what is lost with 4 (`sensitivity`;
    with 8 as good as nothing)."""

    bytes_4: int
    bytes_8: int
    loss: float


def allocate(choices: Mapping[str, Choice], size_bytes: int) -> dict[str, int]:
    """Bits by name, at most `size_bytes` together, or 4 for all where those take more.

    Those that lose most a byte are raised first; one that does not fit leaves its place to the next.
    """
    left = size_bytes - sum(choice.bytes_4 for choice in choices.values())
    bits = dict.fromkeys(choices, 4)

    def a_byte(name: str) -> float:
        choice = choices[name]
        return choice.loss / (choice.bytes_8 - choice.bytes_4)

    for name in sorted(choices, key=a_byte, reverse=True):
        more = choices[name].bytes_8 - choices[name].bytes_4
        if more <= left:
            bits[name], left = 8, left - more
    return bits
