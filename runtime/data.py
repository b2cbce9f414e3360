"""Records: JSON lines as the Hugging Face world writes them, or mappings from Python."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepeft.errors import DataError

RecordSource = str | Path | Iterable[Mapping[str, Any]]
"""A JSONL file by path, or the records themselves."""

_MAX_LINE_BYTES = 2**24


@dataclass(frozen=True)
class Record:
    """One record and where it came from (`data.jsonl:7`, or `record 7`)."""

    where: str
    fields: Mapping[str, Any]


def records(source: RecordSource) -> Iterator[Record]:
    """Go through the records one at a time, so that a large file is never in memory whole.

    Raises:
        DataError: the file cannot be read, a line is not a JSON object, or there is no record at all.
    """
    count = 0
    for record in _lines(Path(source)) if isinstance(source, str | Path) else _mappings(source):
        count += 1
        yield record
    if not count:
        name = str(source) if isinstance(source, str | Path) else "the data"
        raise DataError(
            f'{name}: holds no records: write one JSON object a line, such as {{"text": …, "label": …}}'
        )


def _mappings(source: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, fields in enumerate(source, start=1):
        if not isinstance(fields, Mapping):
            raise DataError(f"record {number}: is a {type(fields).__name__}, expected a dict")
        yield Record(f"record {number}", fields)


def _lines(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise DataError(
                        f"{where}: the line is longer than {_MAX_LINE_BYTES:,} B: split the record"
                    )
                if line.strip():
                    yield Record(where, _parse(line, where))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error}): write one object a line") from error
    if not isinstance(fields, dict):
        raise DataError(
            f'{where}: is a JSON {type(fields).__name__}, expected an object such as {{"text": …}}'
        )
    return fields
