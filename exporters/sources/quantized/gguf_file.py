"""Where a GGUF file has its tensors: its header, of which nothing else is kept, checked against its size.

The package's own `GGUFReader` makes arrays of every token of the vocabulary, and of a damaged file it says
neither which tensor is wrong nor why. Source: GGUF, versions 2 and 3 (ggml, docs/gguf.md).
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from edgepeft.errors import ExportError

_REMEDY = "compare its size with where it came from"
_VERSIONS = (2, 3)
#: Where tensors begin, unless the file says otherwise, bytes.
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
#: `struct`'s letter of each value that has one size.
_LETTERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
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
    return _Header(path).tensors()


class _Header:
    """A file that is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = np.memmap(path, np.uint8, "r")
        self.place = 4

    def tensors(self) -> list[GgufTensor]:
        version = self.take("I")
        if version not in _VERSIONS:
            order = ", or its numbers are big-endian" if version & 0xFFFF == 0 else ""
            raise ExportError(
                f"{self.path} is a GGUF file of version {version}{order}: expected "
                f"{' or '.join(map(str, _VERSIONS))}, little-endian; convert the model anew with llama.cpp"
            )
        count, keys = self.take("Q"), self.take("Q")
        alignment = _ALIGNMENT
        for _ in range(keys):
            key = self.text()
            value = self.value(key)
            if key == _ALIGNMENT_KEY:
                alignment = self.checked_alignment(value)
        entries = [self.entry() for _ in range(count)]
        first = math.ceil(self.place / alignment) * alignment
        return [self.placed(first, *entry) for entry in entries]

    def take(self, letter: str) -> int:
        """The next number."""
        found = struct.unpack_from(f"<{letter}", self.bytes, self.skip(struct.calcsize(f"<{letter}")))
        return int(found[0])

    def skip(self, size: int) -> int:
        """Where the next `size` bytes begin.

        Raises:
            ExportError: the file ends before they do.
        """
        begin = self.place
        self.place += size
        if self.place > len(self.bytes):
            raise ExportError(
                f"{self.path} is cut short or damaged: its header asks for {size} bytes at {begin}, and the "
                f"file has {len(self.bytes)}; {_REMEDY}"
            )
        return begin

    def text(self) -> str:
        begin = self.skip(self.take("Q"))
        return self.bytes[begin : self.place].tobytes().decode("utf-8", "replace")

    def value(self, key: str) -> int | None:
        """Step over a value; the value, where it is a whole number."""
        kind = self.take("I")
        if kind == GGUFValueType.ARRAY:
            kind, count = self.take("I"), self.take("Q")
            if kind == GGUFValueType.STRING:
                for _ in range(count):
                    self.skip(self.take("Q"))
            else:
                self.skip(count * struct.calcsize(self.letter(key, kind)))
            return None
        if kind == GGUFValueType.STRING:
            self.skip(self.take("Q"))
            return None
        letter = self.letter(key, kind)
        if letter in "fd":
            self.skip(struct.calcsize(letter))
            return None
        return self.take(letter)

    def letter(self, key: str, kind: int) -> str:
        if kind not in _LETTERS:
            raise ExportError(
                f"{self.path} is cut short or damaged: its entry {key[:80]!r} is of type {kind}, which GGUF "
                f"does not have; {_REMEDY}"
            )
        return _LETTERS[GGUFValueType(kind)]

    def checked_alignment(self, value: int | None) -> int:
        if value is None or value <= 0 or value & (value - 1):
            raise ExportError(
                f"{self.path} is damaged: {_ALIGNMENT_KEY} is {value}, expected a power of 2; {_REMEDY}"
            )
        return value

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor."""
        name = self.text()
        count = self.take("I")
        begin = self.skip(8 * count)
        sizes = struct.unpack_from(f"<{count}Q", self.bytes, begin)
        return name, sizes[::-1], self.take("I"), self.take("Q")

    def placed(self, first: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        """A tensor whose offset counts from `first`.

        Raises:
            ExportError: see `read_tensors`.
        """
        known = next((each for each in GGML_QUANT_SIZES if each == kind), None)
        if known is None:
            raise ExportError(
                f"{self.path}: tensor {name} is of type {kind}, which the package gguf does not know: "
                "quantize the model to one of the usual types (Q4_K_M, Q8_0), or update gguf"
            )
        block, block_bytes = GGML_QUANT_SIZES[known]
        row = shape[-1] if shape else 1
        if row % block:
            raise ExportError(
                f"{self.path}: tensor {name} has rows of {row} values, which are no blocks of {block}, as "
                f"{known.name} has them: the file is damaged; {_REMEDY}"
            )
        size = math.prod(shape) // block * block_bytes
        begin = first + offset
        if begin + size > len(self.bytes):
            raise ExportError(
                f"{self.path} is cut short or damaged: tensor {name} is at bytes {begin} to {begin + size}, "
                f"and the file has {len(self.bytes)}; {_REMEDY}"
            )
        return GgufTensor(name, known, shape, begin, size)
