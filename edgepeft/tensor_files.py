"""Reading and writing safetensors files, with every float as float32.

The safetensors package checks the header before it hands anything out; what is added here is bfloat16, which
it does not give as numpy arrays, errors that name the file, and checksums for the files that edgepeft alone
reads.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import safetensors

from .errors import AdapterError, EdgePeftError
from .files import atomic_file

_PIECE_VALUES = 2**18
_FLOATS = ("F64", "F32", "F16", "BF16")
_STATES = ("F32", "U8")
_DTYPES = {"F32": "float32", "F16": "float16", "I8": "int8", "U8": "uint8"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 2**24
_CHECKSUMS = "crc32"
_METADATA = "__metadata__"


class Pieces(Protocol):
    """A flat tensor that can be read in pieces."""

    dtype: np.dtype[Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values from `start` to `stop` (exclusive, or the end)."""


def read_tensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a safetensors file as float32, by name.

    Raises:
        AdapterError: the file is missing or damaged, or holds a dtype other than a float of 16, 32 or 64
            bits.
    """
    path = Path(path)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    halves: list[str] = []
    with _opened(path) as file:
        # One at a time: a device has no room for the file beside its tensors.
        for name in sorted(file.keys()):
            dtype = file.get_slice(name).get_dtype()
            if dtype not in _FLOATS:
                raise AdapterError(
                    f"{path}: tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(_FLOATS)}"
                )
            if dtype == "BF16":
                halves.append(name)
            else:
                with np.errstate(over="ignore"):  # a float64 out of range becomes inf, refused by the caller
                    tensors[name] = file.get_tensor(name).astype(np.float32, copy=False)
    return tensors | _bfloat16(path, halves) if halves else tensors


def header_size(path: Path) -> int:
    """Bytes of a safetensors file's header.

    Raises:
        AdapterError: the file cannot be read, or its header is too long.
    """
    try:
        with Path(path).open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    if header_bytes > _MAX_HEADER_BYTES:
        raise AdapterError(
            f"{path}: its header has {header_bytes:,} B, expected at most {_MAX_HEADER_BYTES:,}"
        )
    return header_bytes


def count_values(path: Path) -> int:
    """How many values the tensors of a safetensors file have, of which none is read.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    with _opened(Path(path)) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file, of which none is read.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    with _opened(Path(path)) as file:
        return sorted(file.keys())


def read_state(path: Path, name: str) -> npt.NDArray[np.generic] | None:
    """One tensor of a safetensors file as it is, float32 or uint8; None if there is no such tensor.

    Raises:
        AdapterError: the file is missing or damaged, or the tensor has another dtype.
    """
    with _opened(path) as file:
        if name not in file.keys():  # noqa: SIM118
            return None
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _STATES:
            raise AdapterError(f"{path}: tensor {name!r} has dtype {dtype!r}, expected F32 or U8")
        tensor: npt.NDArray[np.generic] = file.get_tensor(name)
        return tensor


def _bfloat16(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors that numpy has no dtype for, of a file whose header is checked: bfloat16 is the upper half of a
    float32. They are read one at a time, too."""
    tensors = {}
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        for name in names:
            begin, end = header[name]["data_offsets"]
            file.seek(8 + header_bytes + begin)
            stored = np.fromfile(file, "<u2", (end - begin) // 2).astype(np.uint32) << 16
            tensors[name] = stored.view(np.float32).reshape(header[name]["shape"])
    return tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, its header checked.

    Raises:
        AdapterError: it is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path}: is damaged or not safetensors ({error}): copy it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's `__metadata__`.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


class TensorFile:
    """A safetensors file whose tensors are read when they are asked for; it is open as long as this lives.

    Args:
        path: the file.

    Attributes:
        metadata: the texts in its `__metadata__`.
        specs: dtype and shape of every tensor, by name.

    Raises:
        AdapterError: the file is missing or damaged, its header is too long, or it holds a dtype that numpy
            has not.
    """

    def __init__(self, path: Path) -> None:
        header_size(path)
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_opened(path))
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self.specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
            for name in self._file.keys():  # noqa: SIM118
                part = self._file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise AdapterError(
                        f"{path}: tensor {name!r} has dtype {part.get_dtype()!r}, expected one of "
                        f"{', '.join(_DTYPES)}"
                    )
                self.specs[name] = np.dtype(_DTYPES[part.get_dtype()]), tuple(part.get_shape())
            self._open = stack.pop_all()

    def part(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[np.generic]:
        """Some of a tensor; nothing else is read."""
        value: npt.NDArray[np.generic] = self._file.get_slice(name)[index]
        return value


def write_in_pieces(
    path: Path,
    tensors: Mapping[str, Pieces],
    metadata: Mapping[str, str],
) -> None:
    """Write flat tensors, float32 or uint8, as a safetensors file, a piece at a time: for what must not be in
    memory whole, as `safetensors` would have it. It has checksums, and is read back before it takes the place
    of the file that was there.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    specs = {name: (tensor.dtype, [len(tensor)]) for name, tensor in tensors.items()}
    checksums = dict.fromkeys(tensors, 0)
    with atomic_file(path, _prove) as file:
        file.write(_header(specs, _with_checksums(metadata, checksums)))
        for name, tensor in tensors.items():
            for start in range(0, len(tensor), _PIECE_VALUES):
                piece = tensor.read(start, start + _PIECE_VALUES).data
                checksums[name] = zlib.crc32(piece, checksums[name])
                file.write(piece)
        file.seek(0)
        file.write(_header(specs, _with_checksums(metadata, checksums)))  # as long as the first


def _with_checksums(metadata: Mapping[str, str], checksums: Mapping[str, int]) -> dict[str, str]:
    """The metadata, and the CRC-32 of each tensor and of the metadata itself in 8 digits each."""
    of_all = {_METADATA: _checksum_of(metadata), **checksums}
    return {**metadata, _CHECKSUMS: json.dumps({name: f"{value:08x}" for name, value in of_all.items()})}


def _checksum_of(metadata: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(sorted(metadata.items())).encode())


def check_sums(path: Path) -> None:
    """Read a file once, from the disk where the system can be told to, and compare its checksums.

    Raises:
        AdapterError: it is missing or damaged, or has none.
    """
    header_size(path)
    metadata = read_metadata(path)
    try:
        expected = json.loads(metadata.pop(_CHECKSUMS, "null"))
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict):
        raise AdapterError(f"{path}: has no checksums")
    got = {_METADATA: _checksum_of(metadata)}
    try:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            for name in tensor_names(path):
                begin, end = header[name]["data_offsets"]
                file.seek(8 + header_bytes + begin)
                got[name] = _checksum(file, end - begin)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    for name in sorted(got.keys() | expected.keys()):
        found = f"{got[name]:08x}" if name in got else None
        if found != expected.get(name):
            raise AdapterError(
                f"{path}: is damaged: {name} has the CRC-32 {found}, expected {expected.get(name)}"
            )


def _checksum(file: BinaryIO, nbytes: int) -> int:
    checksum = 0
    while nbytes and (piece := file.read(min(nbytes, _PIECE_VALUES))):
        checksum = zlib.crc32(piece, checksum)
        nbytes -= len(piece)
    return checksum


def _prove(path: Path) -> None:
    try:
        check_sums(path)
    except AdapterError as error:
        raise EdgePeftError(
            f"{path.parent}: what was written there reads back differently, nothing was changed: the disk is "
            f"failing, write somewhere else ({error})"
        ) from error


def write_tensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[np.generic]],
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
    *,
    checksums: bool = False,
) -> None:
    """Write tensors as a safetensors file, byte for byte as the package does, from their own memory.

    The package's `save_file` renames a file of its own over the one that it is given: what is flushed to the
    disk would not be the tensors, nobody but the user could read them, and Windows lets no open file be
    replaced. Its `save` makes a copy of them all.

    With `checksums`, `check_sums` can tell whether the file is what was written.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    wide_first = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    contiguous = {name: np.asarray(tensors[name], order="C") for name in wide_first}
    if checksums:
        sums = {name: zlib.crc32(array.reshape(-1).data) for name, array in contiguous.items()}
        metadata = _with_checksums(metadata, sums)
    with atomic_file(path) as file:
        specs = {name: (array.dtype, array.shape) for name, array in contiguous.items()}
        file.write(_header(specs, metadata))
        for array in contiguous.values():
            file.write(array.reshape(-1).data)


def _header(specs: Mapping[str, tuple[np.dtype[Any], Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before tensors of these dtypes and shapes in a safetensors file.

    Source: https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
