"""Processes that measure, some at a time."""

import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from edgepeft.errors import ExportError


class Processes:
    """Runs modules of this package, each in a Python of its own, for any number of threads.

    Leaving the block ends those that still run; none is started afterwards.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()

    def output(self, module: str, *arguments: object) -> str:
        """What a module prints.

        Args:
            module: its name in `edgepeft.exporters.measure`; it takes the role of a graph second.
            arguments: of its command line.

        Raises:
            ExportError: it failed; the last line of what it said is the reason.
        """
        command = [sys.executable, "-m", f"edgepeft.exporters.measure.{module}", *map(str, arguments)]
        with self._lock:
            if self._ended:
                raise ExportError("measuring the memory was broken off")
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self._running.add(process)
        out, said = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            reason = next(iter(said.strip().splitlines()[-1:]), f"exit code {process.returncode}")
            raise ExportError(f"measuring the memory of the graph {arguments[1]!r} failed: {reason}")
        return out
