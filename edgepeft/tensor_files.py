"""Reading and writing safetensors files, with every float as float32.

The safetensors package checks the header before it hands anything out; what is added here is bfloat16, which
it does not give as numpy arrays, and errors that name the file.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from edgepeft.errors import AdapterError
from edgepeft.files import atomic_write

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a safetensors file as float32, by name.

    Raises:
        AdapterError: the file is missing or damaged, or holds a dtype other than a float of 16, 32 or 64
            bits.
    """
    path = Path(path)
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path}: is damaged or not safetensors ({error}): copy it again") from error
    tensors = {}
    for name, entry in sorted(entries):
        if entry["dtype"] not in _FLOATS:
            raise AdapterError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']!r}, expected one of {', '.join(_FLOATS)}"
            )
        tensors[name] = _to_float32(entry["data"], entry["dtype"]).reshape(entry["shape"])
    return tensors


def _to_float32(raw: bytes | bytearray, dtype: str) -> npt.NDArray[np.float32]:
    stored = np.frombuffer(raw, _FLOATS[dtype])
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a float64 out of range becomes inf, which the caller refuses by name
        return stored.astype(np.float32)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's `__metadata__`.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path}: is damaged or not safetensors ({error}): copy it again") from error


def write_tensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write float32 tensors as a safetensors file.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    contiguous = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    atomic_write(path, safetensors.numpy.save(contiguous, dict(metadata)))
