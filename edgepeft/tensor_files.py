"""Reading and writing safetensors files with nothing but numpy, every number in the header checked first.

The safetensors package refuses bfloat16 in numpy and reads whole files; here a tensor is read straight into
the float32 array it ends up in.

Source: https://github.com/huggingface/safetensors (format description in its README).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgepeft.errors import AdapterError
from edgepeft.files import atomic_file

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_AXES = 8
_METADATA = "__metadata__"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _read_header(file: BinaryIO, path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The header's JSON and the offset at which the tensors' bytes begin."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterError(f"{path}: {file_bytes} B is too short for a safetensors file: copy it again")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise AdapterError(
            f"{path}: its header claims {header_bytes:,} B, the file has {file_bytes:,} B: truncated or not "
            "safetensors"
        )
    try:
        header = json.loads(file.read(header_bytes).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: its safetensors header cannot be read ({error}): copy it again"
        ) from error
    if not isinstance(header, dict):
        raise AdapterError(f"{path}: its safetensors header is a {type(header).__name__}, expected an object")
    return header, 8 + header_bytes


def _naturals(value: object) -> tuple[int, ...] | None:
    """The value as a tuple if it is a short list of sizes, otherwise None."""
    if not isinstance(value, list) or len(value) > _MAX_AXES:
        return None
    return tuple(value) if all(type(item) is int and 0 <= item < 2**48 for item in value) else None


def _check_entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Data type, shape, begin and end of one tensor, all of them consistent."""

    shape = _naturals(entry.get("shape")) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or shape is None:
        raise AdapterError(f"{path}: tensor {name!r} has no usable shape in the header")
    offsets = _naturals(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterError(
            f"{path}: tensor {name!r} has data_offsets {entry.get('data_offsets')!r}, expected [begin, end]"
        )
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise AdapterError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(_ITEM_BYTES)}"
        )
    expected_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected_bytes:
        raise AdapterError(
            f"{path}: tensor {name!r} of shape {list(shape)} in {dtype} needs {expected_bytes:,} B, its "
            f"data_offsets span {offsets[1] - offsets[0]:,} B"
        )
    return dtype, shape, offsets[0], offsets[1]


def _to_float32(raw: bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    stored = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    with np.errstate(over="ignore"):  # a float64 out of range becomes inf, which the caller refuses by name
        return np.frombuffer(raw, stored).astype(np.float32).reshape(shape)


def read_tensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a safetensors file as float32, in the file's order.

    Raises:
        AdapterError: the file is missing or damaged, or holds a dtype other than a float of 16, 32 or 64
            bits.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            header, start = _read_header(file, path, file_bytes)
            entries = {
                name: _check_entry(path, name, entry) for name, entry in header.items() if name != _METADATA
            }
            tensors: dict[str, npt.NDArray[np.float32]] = {}
            position = 0
            for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
                if begin != position:
                    raise AdapterError(f"{path}: tensor {name!r} begins at byte {begin}, expected {position}")
                if start + end > file_bytes:
                    raise AdapterError(
                        f"{path}: tensor {name!r} ends at byte {start + end:,}, the file has {file_bytes:,} "
                        "B: it is truncated, copy it again"
                    )
                tensors[name] = _to_float32(file.read(end - begin), dtype, shape)
                position = end
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start + position != file_bytes:
        raise AdapterError(f"{path}: has {file_bytes:,} B, its header accounts for {start + position:,} B")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's `__metadata__`.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header, _ = _read_header(file, path, path.stat().st_size)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{path}: its __metadata__ is not an object of texts")
    return metadata


def write_tensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write float32 tensors as a safetensors file, byte for byte what the safetensors package would write.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    position = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name], dtype="<f4").tobytes())
