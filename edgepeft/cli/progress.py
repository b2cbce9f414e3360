"""What a command that takes its time is doing, on standard error."""

import contextlib
import shutil
import sys
import threading
import time

import click

PATIENCE_S = 2.0
"""A command, and a stage of it, that takes less says nothing."""
EVERY_S = 5.0
"""Seconds from one line to the next, where standard error is no terminal."""
_REDRAW_S = 0.1
_BAR = 10


class Progress:
    """A line at a terminal that is written over again and again; else a whole line now and then, and of a
    count the first and the last. A thread keeps the seconds going where the command says nothing.

    Whoever reads standard error may go away: that is no reason to end the work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ticker: threading.Thread | None = None
        self._began_s = time.monotonic()
        self._stage: str | None = None
        self._stage_s = 0.0
        self._count = self._note = ""
        self._share: float | None = None
        self._first = (0.0, 0.0)  # share of the first count, which may be of a run before this one, and when
        self._said_s: float | None = None
        self._width = 0  # of the line that is to be written over

    def stage(self, name: str, *, at_once: bool = False) -> None:
        """Something begins, and what was before it is over.

        Args:
            name: what it is, such as `reading the records`.
            at_once: say so now, and not only once the command has taken `PATIENCE_S`.
        """
        with self._lock:
            self._end_stage()
            self._stage, self._stage_s, self._said_s = name, time.monotonic(), None
            if at_once:
                self._say()
        if self._ticker is None:
            ticker = threading.Thread(target=self._tick, daemon=True)
            ticker.start()
            self._ticker = ticker  # now: an interrupt before it has started leaves nothing to wait for

    def update(self, done: int, total: int, unit: str, note: str = "", *, at_once: bool = False) -> None:
        """So much of the stage is done.

        Args:
            done: how many.
            total: of how many.
            unit: of what, such as `steps`.
            note: what else is to be said.
            at_once: as for `stage`.
        """
        with self._lock:
            first, self._share = self._share is None, done / total
            if first:
                self._first = self._share, time.monotonic()
            self._count, self._note = f"{done} of {total} {unit}", note
            if (at_once or self._lasts()) and (first or done == total or self._due(_REDRAW_S)):
                self._say()

    def close(self) -> None:
        """Say no more; a line at a terminal is left as it is."""
        with self._lock:
            self._end_stage()
        self._over.set()
        if self._ticker is not None:
            self._ticker.join()

    @property
    def _terminal(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def _lasts(self) -> bool:
        return time.monotonic() - self._began_s >= PATIENCE_S

    def _due(self, redraw_s: float) -> bool:
        """Whether it is time for the next line."""
        every_s = redraw_s if self._terminal else EVERY_S
        return self._said_s is None or time.monotonic() - self._said_s >= every_s

    def _tick(self) -> None:
        while not self._over.wait(1.0):
            with self._lock:
                if self._stage is not None and self._lasts() and self._due(1.0):
                    self._say()

    def _end_stage(self) -> None:
        if self._stage is None or self._said_s is None:
            pass
        elif self._terminal:
            self._say()
            self._write("\n")
        elif self._share is None and time.monotonic() - self._stage_s >= PATIENCE_S:
            self._say()
        self._stage, self._share, self._width = None, None, 0
        self._count = self._note = ""

    def _say(self) -> None:
        """Write the stage's line."""
        now_s = time.monotonic()
        took_s, bar = now_s - self._stage_s, ""
        if self._terminal and self._share is not None:
            filled = int(self._share * _BAR)
            bar = f" [{'#' * filled}{'-' * (_BAR - filled)}]"
        parts = [f"{self._stage}{bar}" + (f": {self._count}" if self._count else "")]
        if took_s >= 1:
            parts.append(_clock(took_s))
        first_share, first_s = self._first
        if self._share is not None and first_share < self._share < 1 and took_s >= 1:
            left_s = (now_s - first_s) * (1 - self._share) / (self._share - first_share)
            parts.append(f"{_clock(left_s)} left")
        if self._note:  # last, as narrow terminals cut the line
            parts.append(self._note)
        line = ", ".join(parts)
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            self._write(f"\r{line.ljust(self._width)}")
            self._width = len(line)
        else:
            self._write(f"{line}\n")
        self._said_s = now_s

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            click.echo(text, err=True, nl=False)


def _clock(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
