"""safetensors files: what torch reads is what is read here, and one error for each way a file can lie."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from edgepeft.errors import AdapterError, EdgePeftError
from edgepeft.tensor_files import (
    TensorFile,
    check_sums,
    read_metadata,
    read_state,
    read_tensors,
    write_in_pieces,
    write_tensors,
)


@pytest.mark.parametrize("extra", [[], [np.float16, np.uint8, np.int8]], ids=["float32", "all dtypes"])
def test_bytes_are_those_of_the_safetensors_package(tmp_path: Path, extra: list[type]) -> None:
    """Names in any order and beyond ASCII, an empty tensor, a scalar, an array that is not contiguous."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "b": rng.random((3, 5)).astype(np.float32),
        "a.weight": rng.random(7).astype(np.float32),
        "größe": np.zeros((0, 4), np.float32),
        "one": np.array(3, np.float32),
        **{np.dtype(dtype).name: np.arange(7).astype(dtype) for dtype in extra},
    }
    write_tensors(tmp_path / "mine", {**tensors, "b": np.asfortranarray(tensors["b"])})
    theirs = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == theirs
    if not extra:
        mine = read_tensors(tmp_path / "mine")
        assert all(np.array_equal(mine[name], tensors[name]) for name in tensors)


def test_what_is_flushed_to_the_disk_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very file that then stands there, all of it; and with the permissions that any new file has."""
    flushed: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor)))
    write_tensors(tmp_path / "file", {"t": np.ones(1000, np.float32)})
    (tmp_path / "other").write_bytes(b"")
    found = (tmp_path / "file").stat()
    assert (flushed[0].st_ino, flushed[0].st_size) == (found.st_ino, found.st_size)
    assert found.st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """As torch converts them, subnormals and negative zero included."""
    tensor = torch.tensor([[1.5, -0.0, 1e-40, 3.14159, -65504.0]], dtype=torch.float64).to(dtype)
    safetensors.torch.save_file({"t": tensor}, tmp_path / "file")
    got = read_tensors(tmp_path / "file")["t"]
    assert got.dtype == np.float32
    assert got.tobytes() == tensor.to(torch.float32).numpy().tobytes()


def test_metadata_comes_back(tmp_path: Path) -> None:
    """Texts beside the tensors."""
    write_tensors(tmp_path / "file", {}, {"state": '{"step": 3}'})
    assert read_metadata(tmp_path / "file") == {"state": '{"step": 3}'}


def literal(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little"),
        (100).to_bytes(8, "little") + b"{}",
        literal(b"{"),
        literal(b"\xff\xfe"),
        literal(b"[" * 100_000),
        literal(b'{"a":{},"a":{}}'),
        literal([]),
        literal({"t": 3}),
        literal({"t": entry(shape=[-1])}),
        literal({"t": entry(shape=[2.0])}),
        literal({"t": entry(shape=[True])}),
        literal({"t": entry(shape=[1] * 9)}),
        literal({"t": entry(shape=[2**60])}),
        literal({"t": entry(offsets=[8, 0])}),
        literal({"t": entry(offsets=[0])}),
        literal({"t": entry(offsets="all")}),
        literal({"t": entry(dtype=[])}),
        literal({"t": entry(shape=[2**40, 2**40])}),
        literal({"t": entry(shape=[3])}, b"x" * 12),
        literal({"t": entry()}, b"x" * 7),
        literal({"t": entry()}, b"x" * 9),
        literal({"t": entry(offsets=[4, 12])}, b"x" * 12),
        literal({"t": entry(), "u": entry(offsets=[4, 12])}, b"x" * 12),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    """Before anything of the claimed size is allocated."""
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="is damaged or not safetensors") as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    with pytest.raises(AdapterError, match=r"is damaged or not safetensors|its header has"):
        TensorFile(path)


def test_integers_are_no_adapter(tmp_path: Path) -> None:
    """The tensor and its dtype are named."""
    safetensors.numpy.save_file({"t": np.arange(2)}, tmp_path / "file")
    with pytest.raises(AdapterError, match="tensor 't' has dtype 'I64'"):
        read_tensors(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(AdapterError, match=r"nothing: cannot be read \(No such file"):
        read_tensors(tmp_path / "nothing")


def test_what_is_written_in_pieces_the_package_reads(tmp_path: Path) -> None:
    """Of both dtypes, and never more than a piece at a time."""
    rng = np.random.default_rng(0)
    tensors = {"param": rng.random(600_000, np.float32), "codes": rng.integers(0, 256, 1024).astype(np.uint8)}
    pieces: list[int] = []

    class Spied(_Flat):
        def read(self, start: int, stop: int) -> np.ndarray:
            piece = super().read(start, stop)
            pieces.append(len(piece))
            return piece

    spied = {name: Spied(tensor) for name, tensor in tensors.items()}
    write_in_pieces(tmp_path / "state", spied, {"step": "3"})
    assert (len(pieces), max(pieces)) == (4, 2**18)
    found = safetensors.numpy.load_file(tmp_path / "state")
    assert read_metadata(tmp_path / "state")["step"] == "3"
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        np.testing.assert_array_equal(read_state(tmp_path / "state", name), tensor)
    assert read_state(tmp_path / "state", "other") is None


def test_parts_of_tensors_are_read(tmp_path: Path) -> None:
    """Names, dtypes and shapes without them; float16 and bytes too."""
    tensors = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "b": np.arange(6, dtype=np.float16),
        "c": np.arange(6, dtype=np.uint8),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "file", {"key": "value"})
    file = TensorFile(tmp_path / "file")
    assert file.metadata == {"key": "value"}
    assert file.specs == {name: (value.dtype, value.shape) for name, value in tensors.items()}
    np.testing.assert_array_equal(file.part("a", (slice(None), slice(2))), tensors["a"][:, :2])
    np.testing.assert_array_equal(file.part("b", (slice(4),)), tensors["b"][:4])


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_other_dtypes_are_refused_before_they_are_read(tmp_path: Path, dtype: type) -> None:
    """With what was expected."""
    safetensors.numpy.save_file({"a": np.zeros(3, dtype)}, tmp_path / "file")
    with pytest.raises(AdapterError, match=r"'a' has dtype .*64', expected one of F32, F16, I8, U8"):
        TensorFile(tmp_path / "file")


def test_a_written_file_is_on_the_disk_and_as_readable_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the package puts a file of its own in the place of the one that was opened."""
    flushed = []
    flush = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(os.fstat(descriptor).st_ino), flush(descriptor))
    )
    write_tensors(tmp_path / "tensors", {"a": np.ones(3, np.float32)})
    (tmp_path / "plain").write_bytes(b"")
    written = (tmp_path / "tensors").stat()
    assert written.st_ino in flushed
    assert written.st_mode == (tmp_path / "plain").stat().st_mode


class _Flat:
    """What `write_in_pieces` takes."""

    def __init__(self, tensor: np.ndarray) -> None:
        self._tensor, self.dtype = tensor, tensor.dtype

    def __len__(self) -> int:
        return len(self._tensor)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tensor[start:stop]


def write_both_ways(folder: Path) -> list[Path]:
    tensors = {"a": np.arange(5, dtype=np.float32), "b": np.arange(8).astype(np.uint8)}
    write_in_pieces(folder / "pieces", {name: _Flat(value) for name, value in tensors.items()}, {"k": "v"})
    write_tensors(folder / "whole", tensors, {"k": "v"}, checksums=True)
    return [folder / "pieces", folder / "whole"]


def test_checksums_are_those_of_the_bytes(tmp_path: Path) -> None:
    """CRC-32 by tensor, whichever way the file is written."""
    for path in write_both_ways(tmp_path):
        check_sums(path)
        sums = json.loads(read_metadata(path)["crc32"])
        assert sums["a"] == f"{zlib.crc32(np.arange(5, dtype='<f4').tobytes()):08x}"
        assert sums["b"] == f"{zlib.crc32(bytes(range(8))):08x}"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """But those of the spaces behind the header and of its length, which no value stands in."""
    for path in write_both_ways(tmp_path):
        whole = path.read_bytes()
        header = whole.rindex(b"}", 0, len(whole) - 28) + 1
        for bit in range(8 * len(whole)):
            if header <= bit // 8 < len(whole) - 28:
                continue
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(AdapterError):
                check_sums(path)


def test_a_file_without_checksums_has_none_to_check(tmp_path: Path) -> None:
    """An adapter, for example."""
    write_tensors(tmp_path / "file", {"a": np.ones(3, np.float32)})
    with pytest.raises(AdapterError, match="has no checksums"):
        check_sums(tmp_path / "file")


def test_the_file_before_is_kept_until_the_new_one_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that changes what it is given."""
    path = tmp_path / "state"
    write_in_pieces(path, {"a": _Flat(np.zeros(5, np.float32))}, {})
    before = path.read_bytes()

    def bad_disk(descriptor: int) -> None:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        os.pwrite(descriptor, b"\x55", end - 1)

    monkeypatch.setattr(os, "fsync", bad_disk)
    with pytest.raises(EdgePeftError, match="reads back differently, nothing was changed"):
        write_in_pieces(path, {"a": _Flat(np.ones(5, np.float32))}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
