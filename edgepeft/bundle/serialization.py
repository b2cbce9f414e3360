"""`manifest.json` ↔ the manifest's dataclasses."""

import dataclasses
import json
from typing import Any

from ..errors import BundleError
from . import format1
from .decode import decode
from .manifest import FORMAT_VERSION, Manifest
from .validation import validate_manifest


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
    where = f"{origin}: manifest"
    if version == 1:
        data = format1.upgraded(data, where)
    manifest = decode(Manifest, data, where)
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
