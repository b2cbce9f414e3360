"""What JSON holds as dataclasses, strictly: every key known, every value of its declared type."""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

from ..errors import BundleError

_MAX_INT = 2**53  # what every JSON reader keeps exact

#: A value, parsed from JSON, as one of a certain type.
_Read = Callable[[Any], Any]


class _WrongError(Exception):
    """What is wrong with a value, and its place below what is decoded, the last part first: only of what is
    wrong is there a place to be told, and a manifest has thousands of values."""

    def __init__(self, told: str) -> None:
        super().__init__(told)
        self.told = told
        self.parts: list[str] = []


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, parsed from JSON, as an instance of the annotated type `kind`.

    Args:
        kind: a dataclass, or a type that its fields may have.
        value: what `json.loads` gave.
        where: what the value is, for messages.

    Raises:
        BundleError: a field is missing, unknown or of the wrong type.
    """
    try:
        return _reader(kind)(value)
    except _WrongError as wrong:
        raise BundleError(f"{where}{''.join(reversed(wrong.parts))}{wrong.told}") from None


@functools.cache
def _reader(kind: Any) -> _Read:
    """How values of the annotated type `kind` are read; it raises `_WrongError`."""
    if kind is Any:
        return lambda value: value
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _tuple_reader(_reader(arguments[0]))
    if origin is dict:
        return _dict_reader(_reader(arguments[1]))
    if origin in (types.UnionType, typing.Union):
        return _union_reader(arguments)
    return _plain_reader(kind)


def _tuple_reader(read: _Read) -> _Read:
    def read_tuple(value: Any) -> Any:
        if not isinstance(value, list):
            raise _mismatch(value, "a list")
        found: list[Any] = []
        try:
            for item in value:
                found.append(read(item))
        except _WrongError as wrong:
            wrong.parts.append(f"[{len(found)}]")
            raise
        return tuple(found)

    return read_tuple


def _dict_reader(read: _Read) -> _Read:
    def read_dict(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(value, "an object")
        found: dict[str, Any] = {}
        for key, item in value.items():
            try:
                found[key] = read(item)
            except _WrongError as wrong:
                wrong.parts.append(f"[{key!r}]")
                raise
        return found

    return read_dict


def _union_reader(options: tuple[Any, ...]) -> _Read:
    expected = " or ".join("null" if option is type(None) else option.__name__ for option in options)
    readers = [(option, dataclasses.is_dataclass(option), _reader(option)) for option in options]

    def read_union(value: Any) -> Any:
        for option, is_dataclass, read in readers:
            if isinstance(value, dict) if is_dataclass else _is_plain(option, value):
                return read(value)
        raise _mismatch(value, expected)

    return read_union


def _plain_reader(kind: Any) -> _Read:
    def read_plain(value: Any) -> Any:
        if not _is_plain(kind, value):
            raise _mismatch(value, kind.__name__)
        return float(value) if kind is float else value

    return read_plain


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether a JSON scalar is of the Python type `kind`; true is no number, and an integer is a float."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= _MAX_INT
    if kind is int:
        return type(value) is int and abs(value) <= _MAX_INT
    return type(value) is kind


def _dataclass_reader(kind: Any) -> _Read:
    hints = typing.get_type_hints(kind)
    fields = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}
    needed = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def read_dataclass(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(value, "an object")
        if unknown := sorted(value.keys() - fields.keys()):
            raise _WrongError(f": has an unknown field {unknown[0]!r}")
        arguments: dict[str, Any] = {}
        for name, read in fields.items():
            if name in value:
                try:
                    arguments[name] = read(value[name])
                except _WrongError as wrong:
                    wrong.parts.append(f".{name}")
                    raise
            elif name in needed:
                raise _WrongError(f": lacks the field {name!r}")
        return kind(**arguments)

    return read_dataclass


def _mismatch(value: Any, expected: str) -> _WrongError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return _WrongError(f" is {shown}, expected {expected}")
