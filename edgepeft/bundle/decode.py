"""What JSON holds as dataclasses, strictly: every key known, every value of its declared type."""

import dataclasses
import functools
import types
import typing
from typing import Any

from ..errors import BundleError

_MAX_INT = 2**53  # what every JSON reader keeps exact


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, parsed from JSON, as an instance of the annotated type `kind`.

    Args:
        kind: a dataclass, or a type that its fields may have.
        value: what `json.loads` gave.
        where: what the value is, for messages.

    Raises:
        BundleError: a field is missing, unknown or of the wrong type.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, value, "a list")
        return tuple(decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, value, "an object")
        return {key: decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return _of_dataclass(option, value, where)
            if _is_plain(option, value):
                return float(value) if option is float else value
        expected = " or ".join("null" if option is type(None) else option.__name__ for option in arguments)
        raise _mismatch(where, value, expected)
    if not _is_plain(kind, value):
        raise _mismatch(where, value, kind.__name__)
    return float(value) if kind is float else value


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether a JSON scalar is of the Python type `kind`; true is no number, and an integer is a float."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= _MAX_INT
    if kind is int:
        return type(value) is int and abs(value) <= _MAX_INT
    return type(value) is kind


def _of_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, value, "an object")
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        raise BundleError(f"{where}: has an unknown field {unknown[0]!r}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = decode(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BundleError(f"{where}: lacks the field {name!r}")
    return kind(**arguments)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _mismatch(where: str, value: Any, expected: str) -> BundleError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return BundleError(f"{where} is {shown}, expected {expected}")
