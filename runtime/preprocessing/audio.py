"""Recordings to samples as a model takes them."""

import io
import struct
import wave
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import AudioPreprocessing
from edgepeft.errors import DataError

from ..memory.room import check_room
from .arrays import mapped_array

FloatArray = npt.NDArray[np.float32]

_NUMBER_BYTES = 12
"""What turning a sample into a number takes."""


def read_audio(value: object, settings: AudioPreprocessing, limit: int) -> FloatArray:
    """Samples float32 from -1 to 1, `[samples]`, several channels being averaged.

    Args:
        value: an array at the model's sampling rate, of floats or int16, or the path of a .wav file (PCM) or
            of a .npy file with such an array.
        settings: the model's.
        limit: samples that are read at most.

    Raises:
        DataError: it cannot be read, or has another sampling rate.
        BudgetError: the memory budget has no room for it.
    """
    if isinstance(value, str | Path):
        path = Path(value)
        if path.suffix != ".npy":
            return _wav(path, settings.sampling_rate, limit)
        value = mapped_array(path)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError("has rows of different lengths") from error
    if array.ndim != 1 or not array.size or not (array.dtype.kind == "f" or array.dtype == np.int16):
        raise DataError(f"is {list(array.shape)} of {array.dtype}, expected [samples] of floats, or of int16")
    samples = array[:limit].astype(np.float32)
    if not np.isfinite(samples).all():
        raise DataError("holds a sample that is no finite number")
    return samples / np.float32(2**15) if array.dtype == np.int16 else samples


def preprocess(samples: FloatArray, settings: AudioPreprocessing) -> FloatArray:
    """As transformers' `Wav2Vec2FeatureExtractor`: zero mean and unit variance, where the model wants it."""
    if not settings.normalize:
        return samples
    with np.errstate(over="ignore", invalid="ignore"):
        mean, variance = samples.mean(), samples.var()
    if not np.isfinite(variance):
        raise DataError("holds samples that are too large to be normalized, expected -1 to 1")
    return np.asarray((samples - mean) / np.sqrt(variance + np.float32(1e-7)), np.float32)


def _with_plain_header(file: BinaryIO) -> Any:
    """The file itself, or one whose header is of the extended kind (`WAVE_FORMAT_EXTENSIBLE`, for more than
    two channels or 16 bits) and says PCM, with the plain kind's tag: Python 3.11's `wave` reads no other."""
    file.seek(12)
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"fmt ":
            place, content = file.tell(), file.read(min(size, 40))
            if len(content) >= 26 and content[:2] == b"\xfe\xff" and content[24:26] == b"\x01\x00":
                file.seek(0)
                return _Tagged(file, place)
            break
        file.seek(size + size % 2, io.SEEK_CUR)
    file.seek(0)
    return file


class _Tagged:
    """A file with the tag of PCM (1) at one place."""

    def __init__(self, file: BinaryIO, place: int) -> None:
        self._file, self._place = file, place

    def read(self, size: int = -1, /) -> bytes:
        first = self._file.tell() - self._place
        data = bytearray(self._file.read(size))
        for offset, byte in enumerate(b"\x01\x00"):
            if 0 <= offset - first < len(data):
                data[offset - first] = byte
        return bytes(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _wav(path: Path, sampling_rate: int, limit: int) -> FloatArray:
    try:
        with path.open("rb") as opened, wave.open(_with_plain_header(opened), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            if width > 4:
                raise DataError(f"{path} has samples of {width} bytes, expected 1 to 4: convert it first")
            if rate != sampling_rate:
                raise DataError(
                    f"{path} has {rate} samples a second, the model takes {sampling_rate}: convert it first"
                )
            there = path.stat().st_size // (channels * width)  # a header may say anything
            count = min(limit, file.getnframes(), there)
            check_room(
                count * channels * (width + _NUMBER_BYTES),
                f"{path}, {count:,} samples of {channels} channels,",
            )
            data = file.readframes(count)
    except (OSError, EOFError, RuntimeError, wave.Error) as error:  # RuntimeError: a chunk ends too early
        raise DataError(f"{path} is no WAV file with PCM samples ({error})") from error
    data = data[: len(data) - len(data) % (channels * width)]
    if not data:
        raise DataError(f"{path} holds no samples")
    if width == 3:  # as the upper bytes of 32 bits
        whole = np.zeros((len(data) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        numbers = whole.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    elif width == 1:
        numbers = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(2**7)
    else:
        numbers = np.frombuffer(data, f"<i{width}").astype(np.float32) / np.float32(2 ** (8 * width - 1))
    return np.asarray(numbers.reshape(-1, channels).mean(axis=1), np.float32)
