"""PEFT's `rank_pattern` and `alpha_pattern`: values by regular expressions that match the names of modules.

Python's matcher tries every way in which an expression may match, and a short expression may have 2^100 of
them. An adapter may come from anywhere, so the ways are counted before anything is matched.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

_MOST_CHARACTERS = 500
_MOST_WAYS = 2**24
"""All names and expressions of an adapter together: some seconds of a small computer."""
_MANY = 2**64


class ModulePatterns:
    """Values by expression; the first that matches the end of a module's name counts, as in PEFT.

    Args:
        patterns: values by expression; None if there are none.

    Raises:
        ValueError: an expression is none; the message names it.
    """

    def __init__(self, patterns: Mapping[str, Any] | None) -> None:
        self._values = []
        for key, value in (patterns or {}).items():
            if len(key) > _MOST_CHARACTERS:
                raise ValueError(f"key {_shown(key)} has {len(key):,} characters: name the modules")
            try:
                # As PEFT's `get_pattern_key` has it.
                self._values.append((re.compile(rf"(.*\.)?({key})$"), key, value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"key {_shown(key)} is no regular expression ({error})") from error

    def check_cost(self, modules: Collection[str]) -> None:
        """Refuse what it could take minutes to match these names with.

        Raises:
            ValueError: names the costliest expression.
        """
        longest = max(map(len, modules), default=0)
        if self._values and longest > _MOST_CHARACTERS:
            raise ValueError(f"is to be matched with a module's name of {longest:,} characters")
        ways = {key: len(modules) * _ways(key, longest) for _, key, _ in self._values}
        if sum(ways.values()) > _MOST_WAYS:
            worst = max(ways, key=lambda key: ways[key])
            raise ValueError(f"key {_shown(worst)} is too costly to match: name the modules")

    def value(self, module: str, default: Any) -> Any:
        """The value for a module."""
        return next((value for pattern, _, value in self._values if pattern.match(module)), default)


def _shown(key: str) -> str:
    return repr(key if len(key) <= 100 else key[:97] + "...")


def _ways(key: str, characters: int) -> int:
    """In how many ways, at most, an expression behind `(.*\\.)?` may match so many characters."""
    choices, stars = _count(re._parser.parse(key), characters)  # type: ignore[attr-defined]
    return min(choices * _places(characters, stars + 1), _MANY)


def _places(characters: int, stars: int) -> int:
    """In how many ways so many repeated characters share a text among them."""
    return math.comb(characters + stars, stars)


def _count(parsed: Any, characters: int) -> tuple[int, int]:
    """Choices that an expression has, and how many of its parts repeat a single character."""
    choices, stars = 1, 0
    for operator, argument in parsed:
        inner_choices, inner_stars = _of_part(str(operator), argument, characters)
        choices, stars = min(choices * inner_choices, _MANY), stars + inner_stars
    return choices, stars


def _of_part(operator: str, argument: Any, characters: int) -> tuple[int, int]:
    if operator == "BRANCH":
        counted = [_count(item, characters) for item in argument[1]]
        return sum(choices for choices, _ in counted), max(stars for _, stars in counted)
    if operator in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
        return _count(argument if operator == "ATOMIC_GROUP" else argument[-1], characters)
    if operator == "GROUPREF_EXISTS":
        yes, no = (_count(item, characters) if item else (1, 0) for item in argument[1:])
        return yes[0] + no[0], max(yes[1], no[1])
    if "REPEAT" not in operator:
        return 1, 0
    least, most, body = argument
    choices, stars = _count(body, characters)
    if most <= 1:
        return choices + 1, stars
    if (choices, stars) == (1, 0):
        return 1, int(least != most)
    times = min(int(most), characters + 1)
    each = 1 + choices * _places(characters, stars)
    return min(each**times if times * math.log2(each) < 64 else _MANY, _MANY), 0
