"""Headers of GGUF files: against the package's reader; a lie is refused in one line that names the tensor."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgepeft.errors import ExportError
from edgepeft.exporters.sources.gguf import load_gguf
from edgepeft.exporters.sources.quantized.gguf_file import read_tensors

pytestmark = pytest.mark.versions

Damage = Callable[[bytearray], bytes | bytearray]


def write(path: Path, alignment: int | None = None) -> bytearray:
    """A file with an entry of every type and a tensor of three types; what it holds."""
    writer = gguf.GGUFWriter(str(path), "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for value in gguf.GGUFValueType:
        if value is gguf.GGUFValueType.ARRAY:
            writer.add_array("texts", ["a", "", "bc"])
            writer.add_array("numbers", [1, 2, 3])
        elif value is gguf.GGUFValueType.STRING:
            writer.add_string("text", "words")
        else:
            writer.add_key_value(value.name.lower(), 1, value)
    writer.add_tensor("half", np.ones((3, 5), np.float16))
    blocks = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("vector", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("alignment", [None, 64])
def test_tensors_are_where_the_package_finds_them(tmp_path: Path, alignment: int | None) -> None:
    write(tmp_path / "model.gguf", alignment)
    found = read_tensors(tmp_path / "model.gguf")
    expected = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert [(t.name, t.kind, t.shape, t.offset, t.size) for t in found] == [
        (t.name, t.tensor_type, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes) for t in expected
    ]
    assert [tensor.is_quantized for tensor in found] == [False, True, False]


def put(where: bytes, offset: int, letter: str, value: int) -> Damage:
    """Another number, so many bytes behind the end of `where`."""

    def damage(data: bytearray) -> bytearray:
        struct.pack_into(f"<{letter}", data, data.index(where) + len(where) + offset, value)
        return data

    return damage


#: Behind a tensor's name are the number of its dimensions (4 bytes), two of them (8 each), its type (4) and
#: its offset (8).
LIES: dict[str, tuple[Damage, str]] = {
    "a row of half a block": (put(b"blocks", 4, "Q", 48), "tensor 'blocks' has rows of 48 values"),
    "more rows": (put(b"blocks", 12, "Q", 10**6), r"tensor 'blocks' has the bytes \d+ to \d+, and the file"),
    "too many rows to count": (put(b"blocks", 12, "Q", 2**64 - 1), "tensor 'blocks' has the bytes"),
    "an offset": (put(b"blocks", 24, "Q", 10**9), "tensor 'blocks' has the bytes"),
    "a type": (
        put(b"blocks", 20, "I", 5),
        "tensor 'blocks' is of type 5, which the package gguf",
    ),
    "dimensions": (put(b"blocks", 0, "I", 9), "tensor 'blocks' has 9 dimensions, expected 4 at most"),
    "the end": (lambda data: data[:-8], "tensor 'vector' has the bytes"),
    "a name": (lambda data: data.replace(b"vector", b"blocks"), "there are two tensors 'blocks'"),
    "a name's length": (put(b"blocks", -14, "Q", 2**63), "its header asks for"),
    "tensors": (put(b"GGUF", 4, "Q", 2**63), "cut short or damaged"),
    "entries": (put(b"GGUF", 12, "Q", 2**63), "cut short or damaged"),
    "an entry's type": (put(b"float32", 0, "I", 77), "its entry 'float32' has values of type 77"),
    "a list of lists": (put(b"numbers", 4, "I", 9), "its entry 'numbers' has values of type 9"),
    "a list's length": (put(b"numbers", 8, "Q", 2**62), "its header asks for"),
    "alignment": (put(b"general.alignment", 4, "I", 0), "general.alignment is 0, expected a power of 2"),
    "alignment's type": (put(b"general.alignment", 0, "I", 6), "general.alignment is None"),
    "version 1": (put(b"GGUF", 0, "I", 1), "of version 1: expected 2 or 3"),
    "big-endian": (put(b"GGUF", 0, "I", 3 << 24), "or its numbers are big-endian"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_named(tmp_path: Path, name: str) -> None:
    """Before transformers reads the file, which would not say where it is."""
    damage, expected = LIES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(write(path, 32)))
    with pytest.raises(ExportError, match=expected) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = write(path)
    last = read_tensors(path)[-1]
    for size in range(4, last.offset + last.size, 7):
        path.write_bytes(data[:size])
        with pytest.raises(ExportError, match="cut short or damaged"):
            read_tensors(path)
