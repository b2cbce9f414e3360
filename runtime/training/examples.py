"""The records of an update, encoded: in memory where they are small, else in a file without a name."""

import hashlib
import pickle
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt

from edgepeft.errors import DataError, EdgePeftError

from ..records import Record
from ..tasks import Example, Task
from ..tasks.examples import NothingToLearnError

HELD_BYTES = 2**20
"""Examples that take no more together are held in memory."""
LEFT_BYTES = 2**19
"""What reading records leaves in the process: of twenty short ones 0.6 to 1.1 MiB were measured."""


class _Numbered(Sequence[Example]):
    """Examples that are had by their number, one at a time."""

    @abstractmethod
    def _at(self, number: int) -> Example:
        """One of them."""

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """An example; of a slice a list of them."""
        if isinstance(index, slice):
            return [self._at(number) for number in range(*index.indices(len(self)))]
        return self._at(index)


class Examples(_Numbered):
    """Records as their task encodes them, once each and in their order.

    Training reads them again and again; a file of what was encoded costs no memory, and no tokenizer has to
    stay for it.

    Args:
        task: encodes them.
        records: to learn from.
        max_length: see `Task.encode`.
        folder: where the file is made, if it takes one.

    Attributes:
        longest: the largest `Example.length`.
        truncated: how many were cut short.
        left_out: how many records had nothing to learn, and are not among these.
        first_left_out: what is said of the first of them.
        digest: SHA-256 of all that was encoded.

    Raises:
        DataError: a record cannot be used, or none has anything to learn.
        EdgePeftError: the file cannot be written.
    """

    def __init__(self, task: Task, records: Iterable[Record], max_length: int, folder: Path) -> None:
        self.longest = self.truncated = self.left_out = 0
        self.first_left_out: str | None = None
        self._folder = folder
        self._held: list[Example] = []
        self._held_bytes = 0
        self._file: IO[bytes] | None = None
        self._ends = array("q", [0])  # of each example in the file
        digest = hashlib.sha256()
        for record in records:
            try:
                example = task.encode_record(record, max_length, training=True)
            except NothingToLearnError as error:
                self.left_out += 1
                self.first_left_out = self.first_left_out or str(error)
                continue
            for values in example.arrays:
                digest.update(b"-" if values is None else values.tobytes() + b"/")
            digest.update(str(example.label).encode())
            self.longest = max(self.longest, example.length)
            self.truncated += example.truncated
            self._writing(self._add, example)
        self.digest = digest.hexdigest()
        if not len(self):
            raise DataError(
                f"{self.first_left_out}: none of the {self.left_out} records has anything to learn"
            )
        if self._file is not None:
            self._writing(self._file.flush)

    def _writing(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except OSError as error:
            raise EdgePeftError(
                f"{self._folder}: the encoded records cannot be kept there ({error.strerror or error}): free "
                "the disk"
            ) from error

    def __len__(self) -> int:
        return len(self._held) or len(self._ends) - 1

    def _at(self, number: int) -> Example:
        """An example, read from the file where there is one."""
        if self._file is None:
            return self._held[number]
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        example: Example
        mapped: _Mapped | None
        example, mapped = pickle.loads(self._file.read(end - start))  # nobody else writes there
        return example if mapped is None else replace(example, values=mapped.open())

    def part(self, indices: npt.NDArray[np.int64]) -> Sequence[Example]:
        """Some of them."""
        return Part(self, indices)

    def _add(self, example: Example) -> None:
        if self._file is None:
            self._held.append(example)
            self._held_bytes += example.held_bytes
            if self._held_bytes <= HELD_BYTES:
                return
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (closed with its reader)
            weakref.finalize(self, self._file.close)
            waiting, self._held = self._held, []
        else:
            waiting = [example]
        for item in waiting:
            mapped = _mapped(item.values)
            kept = item if mapped is None else replace(item, values=None)
            data = pickle.dumps((kept, mapped), protocol=pickle.HIGHEST_PROTOCOL)
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))


class Part(_Numbered):
    """Some of a sequence of examples, by their indices there."""

    def __init__(self, examples: Sequence[Example], indices: npt.NDArray[np.int64]) -> None:
        self._examples, self._indices = examples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _at(self, number: int) -> Example:
        return self._examples[int(self._indices[number])]


@dataclass(frozen=True)
class _Mapped:
    """Values at their place in the file of the user's that they are mapped from."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> npt.NDArray[np.float32]:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def _mapped(values: npt.NDArray[np.float32] | None) -> _Mapped | None:
    """Of values that a file holds as they are, which need not be written once more."""
    if not isinstance(values, np.memmap) or values.filename is None or not values.flags.c_contiguous:
        return None
    return _Mapped(str(values.filename), values.offset, values.dtype.str, values.shape)
