"""Where a GGUF file has its tensors: its header, of which nothing else is kept, checked against its size.

The package's own `GGUFReader` makes arrays of every token of the vocabulary, and of a damaged file it says
neither which tensor is wrong nor why. Source: GGUF, versions 2 and 3 (ggml, docs/gguf.md).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from edgepeft.errors import ExportError

_VERSIONS = (2, 3)
#: Where tensors begin, unless the file says otherwise, bytes.
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_MOST_DIMENSIONS = 4
#: Bytes of a value, where all of its type have as many.
_SIZES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header has it.

    Attributes:
        name: llama.cpp's.
        kind: how its values are stored.
        shape: as numpy has it, rows first.
        offset: of its first byte in the file.
        size: bytes.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def is_quantized(self) -> bool:
        """Whether its values share scales."""
        return GGML_QUANT_SIZES[self.kind][0] > 1


def read_tensors(path: Path) -> list[GgufTensor]:
    """The tensors of a GGUF file, in its order.

    Raises:
        ExportError: it is cut short, of another version or byte order, or has a tensor that is of an unknown
            type, has rows of no whole number of blocks, or is not inside the file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Header(path, data).tensors()


class _Header:
    """A file that is read from its beginning."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.place = 4  # behind its mark

    def tensors(self) -> list[GgufTensor]:
        """See `read_tensors`."""
        version = self.number("I")
        if version not in _VERSIONS:
            order = ", or its numbers are big-endian" if version & 0xFFFF == 0 else ""
            raise ExportError(
                f"{self.path} is a GGUF file of version {version}{order}: expected "
                f"{' or '.join(map(str, _VERSIONS))}, little-endian; convert the model anew with llama.cpp"
            )
        count, keys = self.numbers("QQ")
        alignment = _ALIGNMENT
        for _ in range(keys):
            key, kind = self.text(), self.number("I")
            if key == _ALIGNMENT_KEY:
                alignment = self.alignment(kind)
            else:
                self.skip_value(key, kind)
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, entry = self.entry()
            if name in entries:
                raise self.damaged(f"there are two tensors {name[:80]!r}")
            entries[name] = entry
        first = -(-self.place // alignment) * alignment
        return [self.placed(first, name, *entry) for name, entry in entries.items()]

    def damaged(self, what: str) -> ExportError:
        """The error to raise."""
        return ExportError(
            f"{self.path} is cut short or damaged: {what}; compare its size with where it came from"
        )

    def skip(self, size: int) -> int:
        """Where the next `size` bytes begin; they have to be there."""
        begin = self.place
        self.place += size
        if self.place > len(self.data):
            raise self.damaged(
                f"its header asks for {size} bytes at {begin}, and the file has {len(self.data)}"
            )
        return begin

    def numbers(self, letters: str) -> tuple[int, ...]:
        """The next numbers, by `struct`'s letters."""
        return struct.unpack_from(f"<{letters}", self.data, self.skip(struct.calcsize(f"<{letters}")))

    def number(self, letter: str) -> int:
        return self.numbers(letter)[0]

    def text(self) -> str:
        begin = self.skip(self.number("Q"))
        return self.data[begin : self.place].decode("utf-8", "replace")

    def skip_value(self, key: str, kind: int) -> None:
        """Step over what stands behind a key and a type."""
        count = 1
        if kind == GGUFValueType.ARRAY:
            kind, count = self.numbers("IQ")
        if kind in _SIZES:
            self.skip(count * _SIZES[GGUFValueType(kind)])
        elif kind == GGUFValueType.STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise self.damaged(f"its entry {key[:80]!r} has values of type {kind}, which GGUF does not know")

    def alignment(self, kind: int) -> int:
        value = self.number("I") if kind == GGUFValueType.UINT32 else None
        if not value or value & (value - 1):
            raise self.damaged(f"{_ALIGNMENT_KEY} is {value}, expected a power of 2 in 32 bits")
        return value

    def entry(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Name, and shape, type and offset of the next tensor."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self.damaged(
                f"tensor {name[:80]!r} has {dimensions} dimensions, expected {_MOST_DIMENSIONS} at most"
            )
        shape = self.numbers(f"{dimensions}Q")[::-1]
        kind, offset = self.numbers("IQ")
        return name, (shape, kind, offset)

    def placed(self, first: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        """A tensor whose offset counts from `first`."""
        known = next((each for each in GGML_QUANT_SIZES if each == kind), None)
        if known is None:
            raise ExportError(
                f"{self.path}: tensor {name[:80]!r} is of type {kind}, which the package gguf does not know: "
                "quantize the model to one of the usual types (Q4_K_M, Q8_0), or update gguf"
            )
        block, block_bytes = GGML_QUANT_SIZES[known]
        columns = shape[-1] if shape else 1
        if columns % block:
            raise self.damaged(
                f"tensor {name[:80]!r} has rows of {columns} values, which are no blocks of {block}, as "
                f"{known.name} has them"
            )
        size = math.prod(shape) // block * block_bytes
        begin = first + offset
        if begin + size > len(self.data):
            raise self.damaged(
                f"tensor {name[:80]!r} has the bytes {begin} to {begin + size}, and the file {len(self.data)}"
            )
        return GgufTensor(name, known, shape, begin, size)
