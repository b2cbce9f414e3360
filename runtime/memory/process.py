"""What this process holds in memory, as the kernel accounts it."""

import contextlib
import ctypes
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MAX_SAMPLES = 2000


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory in bytes: all, its peak so far, and of it anonymous and file-backed pages (None if
    unknown)."""

    resident_bytes: int
    peak_bytes: int
    anonymous_bytes: int | None = None
    file_bytes: int | None = None


class Sample(NamedTuple):
    """Resident memory at one moment, in bytes: all, and of it anonymous and file-backed pages (None if
    unknown)."""

    seconds: float
    resident_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None


def read_memory() -> ProcessMemory:
    """The process's resident memory now; elsewhere than on Linux, its peak stands for it."""
    try:
        text = _STATUS.read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Kibibytes everywhere but on macOS.
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        return ProcessMemory(peak_bytes, peak_bytes)
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    sizes = {
        name: int(fields[name].split()[0]) * 1024
        for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")
        if name in fields
    }
    resident = sizes.get("VmRSS", 0)
    return ProcessMemory(resident, sizes.get("VmHWM", resident), sizes.get("RssAnon"), sizes.get("RssFile"))


def reset_peak() -> bool:
    """Let the kernel count the peak anew from now; False where it does not permit that."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def release_freed_memory() -> None:
    """Give pages that malloc keeps after a session was closed back to the system (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class MemoryRecorder:
    """Samples the memory in a thread while a `with` block runs.

    The interval doubles whenever 2,000 samples have gathered, so a run of any length keeps a bounded
    timeline.

    Attributes:
        resettable: whether `peak_bytes` is the block's own peak and not the process's whole past.
        samples: what was held, by seconds since the block began.
        phases: `(seconds since the block began, name)` of what `mark` announced.
    """

    def __init__(self, interval_s: float = 0.02) -> None:
        self.samples: list[Sample] = []
        self.phases: list[tuple[float, str]] = []
        self.resettable = False
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record, name="edgepeft-memory", daemon=True)
        self._start_s = 0.0
        self._peak_bytes = self._recent_bytes = 0

    def __enter__(self) -> Self:
        self.resettable = reset_peak()
        self._start_s = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def mark(self, phase: str) -> None:
        """Note that a phase begins now."""
        self.phases.append((time.perf_counter() - self._start_s, phase))

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory since the block began: the kernel's where it could be reset, else the largest
        sample."""
        return max(self._peak_bytes, self.recent_peak_bytes)

    @property
    def recent_peak_bytes(self) -> int:
        """The same since `forget_peak`."""
        memory = read_memory()
        self._recent_bytes = max(
            self._recent_bytes, memory.peak_bytes if self.resettable else memory.resident_bytes
        )
        return self._recent_bytes

    def forget_peak(self) -> None:
        """Count `recent_peak_bytes` anew from now."""
        self._peak_bytes = self.peak_bytes
        reset_peak()
        self._recent_bytes = 0

    def _sample(self) -> None:
        memory = read_memory()
        self._recent_bytes = max(self._recent_bytes, memory.resident_bytes)
        seconds = time.perf_counter() - self._start_s
        self.samples.append(Sample(seconds, memory.resident_bytes, memory.anonymous_bytes, memory.file_bytes))

    def _record(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()
            if len(self.samples) >= _MAX_SAMPLES:
                del self.samples[1::2]
                self._interval_s *= 2
