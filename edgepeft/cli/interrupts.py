"""Ctrl-C and `kill`: how they end a running command."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to end. It is no `Exception`, so nothing takes it for a failure of its own.

    Attributes:
        exit_code: 128 and the signal's number, as a shell reports it: 130 after Ctrl-C.
        message: what became of the command.
        go_on: the command line that goes on with the work, where there is one.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.message = f"interrupted ({signal.Signals(number).name})"
        self.go_on: str | None = None


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM raises `Interrupted` in the main thread, or waits
    where it is held back; the second ends the process at once, as the system does it.

    A signal that the process was started to ignore (`nohup`, a shell's background job) stays ignored.

    Attributes:
        raised: what was raised. Other code may have caught it and raised something else instead, as modules
            in C do that are being imported.
    """

    def __init__(self) -> None:
        self.raised: Interrupted | None = None
        self._before: dict[int, Any] = {}
        self._held: str | None = None
        self._received: int | None = None

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()

    def hold(self, notice: str) -> None:
        """Raise what has arrived; let what will arrive wait for the next call of this or of `release`.

        Args:
            notice: what is being finished, for the line that answers a signal meanwhile.
        """
        self._held = notice
        self._raise_received()

    def release(self) -> None:
        """Raise what has arrived, and what will arrive as it arrives."""
        self._held = None
        self._raise_received()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Signals have the effect that they have in any Python program: Ctrl-C, as often as it is pressed, a
        `KeyboardInterrupt`."""
        self._forget()
        try:
            yield
        finally:
            self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)

    def _forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        self._received = number
        if self._held is None:
            self._raise_received()
        # `sys.stderr` cannot be entered twice, and the program may be in the middle of writing to it.
        with contextlib.suppress(OSError):
            line = f"{signal.Signals(number).name}: {self._held}; once more ends at once\n"
            os.write(2, (("\n" if os.isatty(2) else "") + line).encode())

    def _raise_received(self) -> None:
        if self._received is not None:
            self.raised = Interrupted(self._received)
            raise self.raised
