"""What this process holds in memory, as the system accounts it."""

import ctypes
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from edgepeft.errors import EdgePeftError

from . import system

_CLEAR_REFS = Path("/proc/self/clear_refs")
_MAX_SAMPLES = 2000


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory in bytes: all, its peak so far, and of it anonymous and file-backed pages; None is
    unknown."""

    resident_bytes: int
    peak_bytes: int | None
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
    """The process's resident memory, for which the peak stands where the system tells no more.

    Raises:
        EdgePeftError: the system tells neither.
    """
    kinds = system.memory_from_status()
    if kinds is not None:
        return ProcessMemory(kinds["VmRSS"], kinds.get("VmHWM"), kinds.get("RssAnon"), kinds.get("RssFile"))
    resident_bytes, peak_bytes = system.memory_from_psutil() or (None, None)
    if peak_bytes is None:
        peak_bytes = system.peak_from_getrusage()
    if resident_bytes is None:
        resident_bytes = peak_bytes
    if resident_bytes is None:
        raise EdgePeftError("this system does not say what a process holds: pip install psutil")
    return ProcessMemory(resident_bytes, peak_bytes)


def reset_peak() -> bool:
    """Let the kernel count the peak anew from now; False where it does not permit that."""
    return system.write_kernel(_CLEAR_REFS, "5")


def release_freed_memory() -> None:
    """Give pages that malloc keeps after a session was closed back to the system (glibc only)."""
    trim = system.c_function("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


class PeakMemory:
    """The most that the process holds from when this is made.

    Where the kernel does not count its peak anew, that of the process's whole past tells as soon as it grows.
    Until then there is only what the process held whenever somebody looked.
    """

    def __init__(self) -> None:
        self._past_bytes = 0 if reset_peak() else read_memory().peak_bytes or 0
        self._seen_bytes = 0
        self._lock = threading.Lock()

    def look(self) -> ProcessMemory:
        """Count what is held now, and return it."""
        with self._lock:
            memory = read_memory()
            counted = max(self._kernels(memory) or 0, memory.resident_bytes)
            self._seen_bytes = max(self._seen_bytes, counted)
            return memory

    @property
    def nbytes(self) -> int:
        """The peak up to now."""
        self.look()
        return self._seen_bytes

    @property
    def is_exact(self) -> bool:
        """Whether that is the kernel's figure, and not the largest that somebody saw."""
        return self._kernels(read_memory()) is not None

    def _kernels(self, memory: ProcessMemory) -> int | None:
        """The kernel's peak, where it is not from before."""
        return memory.peak_bytes if (memory.peak_bytes or 0) > self._past_bytes else None


class MemoryRecorder:
    """Samples the memory in a thread while a `with` block runs.

    The interval doubles whenever 2,000 samples have gathered, so a run of any length keeps a bounded
    timeline.

    Attributes:
        samples: what was held, by seconds since the block began.
        phases: `(seconds since the block began, name)` of what `mark` announced.
    """

    def __init__(self, interval_s: float = 0.02) -> None:
        self.samples: list[Sample] = []
        self.phases: list[tuple[float, str]] = []
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record, name="edgepeft-memory", daemon=True)

    def __enter__(self) -> Self:
        self._whole = self._recent = PeakMemory()
        self._earlier_bytes = 0
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
        """Peak resident memory since the block began; see `PeakMemory`."""
        return max(self._earlier_bytes, self.recent_peak_bytes)

    @property
    def peak_is_exact(self) -> bool:
        """Whether that is the kernel's figure, and not the largest sample."""
        return self._whole.is_exact

    @property
    def recent_peak_bytes(self) -> int:
        """The peak since `forget_peak`."""
        return self._recent.nbytes

    def forget_peak(self) -> None:
        """Count `recent_peak_bytes` anew from now."""
        self._earlier_bytes = self.peak_bytes
        self._recent = PeakMemory()

    def _sample(self) -> None:
        memory = self._recent.look()
        seconds = time.perf_counter() - self._start_s
        self.samples.append(Sample(seconds, memory.resident_bytes, memory.anonymous_bytes, memory.file_bytes))

    def _record(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()
            if len(self.samples) >= _MAX_SAMPLES:
                del self.samples[1::2]
                self._interval_s *= 2
