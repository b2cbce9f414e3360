"""Records: JSON lines as the Hugging Face world writes them, or mappings from Python."""

import codecs
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgepeft.errors import BudgetError, DataError
from edgepeft.sizes import format_size

from .memory.room import PARSED, no_room

RecordSource = str | Path | Iterable[Mapping[str, Any]]
"""A JSONL file by path, standard input as `-`, or the records themselves."""

STANDARD_INPUT = "-"

_MAX_LINE_BYTES = 2**24
_PIECE_BYTES = 2**16
_PACKED = ((b"\x1f\x8b", "gzip", "gunzip"), (b"(\xb5/\xfd", "zstd", "unzstd"), (b"\xfd7zXZ", "xz", "unxz"))


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        where: it came from: `data.jsonl:7`, or `record 7`.
        fields: its content.
        folder: where the files that it names are: the data file's folder, or the working directory.
    """

    where: str
    fields: Mapping[str, Any]
    folder: Path = Path()

    def located(self, field: str) -> object:
        """The value of a field that may be a path: one that is not absolute is taken from the folder."""
        value = self.fields.get(field)
        return self.folder / value if isinstance(value, str | Path) else value


def records(source: RecordSource) -> Iterator[Record]:
    """Go through the records one at a time, so that a large file is never in memory whole.

    Raises:
        DataError: the file cannot be read, a line is not a JSON object, or there is no record at all.
    """
    count = 0
    if isinstance(source, str) and source == STANDARD_INPUT:
        name, found = "standard input", _standard_input()
    elif isinstance(source, str | Path):
        name, found = str(source), _file(Path(source))
    else:
        name, found = "the data", _mappings(source)
    for record in found:
        count += 1
        yield record
    if not count:
        raise DataError(
            f'{name}: holds no records: write one JSON object a line, such as {{"text": …, "label": …}}'
        )


def count_records(source: RecordSource) -> int | None:
    """How many records there are, broken ones included; None where only the end of reading tells."""
    if isinstance(source, Sized) and not isinstance(source, str):
        return len(source)
    if not isinstance(source, str | Path) or source == STANDARD_INPUT or not Path(source).is_file():
        return None
    try:
        with Path(source).open("rb") as file:
            return sum(bool(line.strip()) for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b""))
    except OSError:  # which reading the records tells of
        return None


def _mappings(source: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, fields in enumerate(source, start=1):
        if not isinstance(fields, Mapping):
            raise DataError(f"record {number}: is a {type(fields).__name__}, expected a dict")
        yield Record(f"record {number}", fields)


def _file(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            yield from _lines(file, str(path), path.parent)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}): give a file of JSON lines, or - for "
            "standard input"
        ) from error


def _standard_input() -> Iterator[Record]:
    if sys.stdin is None:
        raise DataError("standard input: is closed: give a file of JSON lines, or pipe one in")
    yield from _lines(sys.stdin.buffer, "standard input", Path())


def _lines(file: BinaryIO, name: str, folder: Path) -> Iterator[Record]:
    number = 0
    while line := file.readline(_PIECE_BYTES):
        number += 1
        where = f"{name}:{number}"
        if len(line) == _PIECE_BYTES and not line.endswith(b"\n"):
            line += _rest(file, where)
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield Record(where, _parse(line, where), folder)


def _rest(file: BinaryIO, where: str) -> bytes:
    """What follows the first piece of a line.

    Raises:
        DataError: the line is longer than any may be.
        BudgetError: the budget has no room for its record.
    """
    rest = bytearray()
    refusal: BudgetError | None = None
    nbytes = _PIECE_BYTES
    while nbytes <= _MAX_LINE_BYTES and (piece := file.readline(_PIECE_BYTES)):
        nbytes += len(piece)
        refusal = no_room(PARSED * nbytes, f"{where}: a record of {format_size(nbytes)}")
        if refusal is None:
            rest += piece
        else:
            rest.clear()
        if piece.endswith(b"\n"):
            break
    if nbytes > _MAX_LINE_BYTES:
        raise DataError(f"{where}: the line is longer than {_MAX_LINE_BYTES:,} B: split the record")
    if refusal is not None:  # only now, as its end had to be found to say how much it takes
        raise refusal
    return bytes(rest)


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start + 1}): "
            f"{_advice(line)}"
        ) from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = ", as jq -c '.[]' makes them of an array" if line.lstrip().startswith(b"[") else ""
        raise DataError(f"{where}: is not JSON ({error}): write one object a line{advice}") from error
    if not isinstance(fields, dict):
        raise DataError(
            f'{where}: is a JSON {type(fields).__name__}, expected an object such as {{"text": …}}'
        )
    return fields


def _advice(line: bytes) -> str:
    """What to do with a line that is not UTF-8."""
    for beginning, name, unpack in _PACKED:
        if line.startswith(beginning):
            return f"it is packed with {name}, unpack it first with {unpack}"
    encoding = "utf-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
    return f"save the file as UTF-8, such as with iconv -f {encoding} -t utf-8"
