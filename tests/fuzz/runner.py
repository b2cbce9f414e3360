"""Many damaged files, one after the other, in a process that is forked, watched, and replaced if it dies."""

import os
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from edgepeft.errors import EdgePeftError

LIMIT_S = 10.0
FREE_BYTES = 64 * 2**20
TIMES = 4
"""A file may take so many times its own size, and `FREE_BYTES`."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        seeds: whole files.
        damage: see `mutate`.
        read: does with a damaged file what the product does; given its bytes and a folder of one's own.
    """

    seeds: list[bytes]
    damage: Callable[[bytes, Random], bytes]
    read: Callable[[bytes, Path], None]


@dataclass
class Outcome:
    """How many files were read and refused, and what went wrong: how often, and the first file's number."""

    read: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """All of them."""
        return self.read + self.refused + sum(self.faults.values())

    def add(self, number: int, told: str) -> None:
        """What became of a file: an empty text, `refused`, or what is wrong."""
        if told in ("read", "refused"):
            setattr(self, told, getattr(self, told) + 1)
        else:
            self.faults[told] += 1
            self.first.setdefault(told, number)


def damaged(name: str, kind: Kind, number: int) -> bytes:
    """The file of a number: always the same."""
    random = Random(f"{name} {number}")
    return kind.damage(random.choice(kind.seeds), random)


def run(name: str, kind: Kind, folder: Path, count: int, seconds: float, first: int = 0) -> Outcome:
    """Read `count` damaged files, or as many as there is time for."""
    outcome, number, end_s = Outcome(), first, time.monotonic() + seconds
    while number < first + count and time.monotonic() < end_s:
        number = _in_a_process(name, kind, folder, number, first + count, end_s, outcome)
    return outcome


def _in_a_process(
    name: str, kind: Kind, folder: Path, number: int, last: int, end_s: float, outcome: Outcome
) -> int:
    """Read files from `number` on until the process dies, has grown, or all are read; returns the next."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _child(name, kind, folder, number, last, end_s, write)
        finally:
            os._exit(0)
    os.close(write)
    told, buffer = None, b""
    while True:
        ready, _, _ = select.select([read], [], [], LIMIT_S)
        chunk = os.read(read, 65536) if ready else b""
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            told = line.decode()
            outcome.add(number, told)
            number += 1
        if not chunk:
            break
    if not ready:
        outcome.add(number, f"hangs for more than {LIMIT_S:.0f} s")
        number += 1
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if ready and code:
        outcome.add(number, f"dies of {signal.Signals(-code).name if code < 0 else code}")
        number += 1
    return number


def _child(name: str, kind: Kind, folder: Path, number: int, last: int, end_s: float, write: int) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    while number < last and time.monotonic() < end_s:
        data = damaged(name, kind, number)
        held_bytes, peak_bytes = _memory()
        told = _outcome(kind, data, folder)
        now_bytes = _memory()[1]
        grown = now_bytes > peak_bytes and now_bytes - held_bytes > FREE_BYTES + TIMES * len(data)
        if grown and told in ("read", "refused"):
            told = "takes more memory than it may"
        os.write(write, told.encode() + b"\n")
        if grown:  # the peak would hide the next one's
            return
        number += 1


def _outcome(kind: Kind, data: bytes, folder: Path) -> str:
    try:
        kind.read(data, folder)
    except EdgePeftError as error:
        return "refused" if "\n" not in str(error).strip() else "refused in more than one line"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            frame
            for frame in frames
            if "/fuzz/" not in frame.filename and "site-packages" not in frame.filename
        ]
        last = (ours or frames)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} ({str(error)[:100]!r})"
    return "read"


def _memory() -> tuple[int, int]:
    """Bytes that this process holds, and the most it ever held."""
    sizes = {}
    with Path("/proc/self/status").open(encoding="utf-8") as status:
        for line in status:
            if line.startswith(("VmRSS", "VmHWM")):
                sizes[line[:5]] = int(line.split()[1]) * 1024
    return sizes["VmRSS"], sizes["VmHWM"]
