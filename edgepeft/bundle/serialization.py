"""`manifest.json` ↔ the manifest's dataclasses, strictly: every key known, every value of its declared
type."""

import dataclasses
import functools
import json
import types
import typing
from typing import Any

from ..errors import BundleError
from .manifest import FORMAT_VERSION, Manifest
from .validation import validate_manifest

_MAX_INT = 2**53  # what every JSON reader keeps exact


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`.

    Raises:
        BundleError: the manifest contradicts itself; nothing that could not be read back is written.
    """
    validate_manifest(manifest)
    return json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False) + "\n"


def manifest_from_json(text: str | bytes, origin: str = "manifest.json") -> Manifest:
    """Read and check a manifest.

    Args:
        text: the JSON.
        origin: the file's path, for messages.

    Raises:
        BundleError: not JSON, of a newer format, or with a field that is missing, unknown, of the wrong type,
            out of range or unsafe.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{origin}: is not a manifest ({error}): copy the bundle again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(f"{origin}: format_version is {version!r}, expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{origin}: written by a newer edgepeft (format {version}, this one reads up to "
            f"{FORMAT_VERSION}): pip install --upgrade edgepeft"
        )
    manifest = _decode(Manifest, data, f"{origin}: manifest")
    assert isinstance(manifest, Manifest)
    try:
        validate_manifest(manifest)
    except BundleError as error:
        raise BundleError(f"{origin}: {error}") from error
    return manifest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, parsed from JSON, as an instance of the annotated type `kind`."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, value, "a list")
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, value, "an object")
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return _decode_dataclass(option, value, where)
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


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
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
            arguments[name] = _decode(hints[name], value[name], f"{where}.{name}")
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
