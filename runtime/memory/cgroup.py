"""A memory cgroup of a fixed size: the kernel kills what does not fit, instead of believing what it says.

Version 2 and version 1 of the interface, both without swap. A cgroup is made below the root of its hierarchy
where that is allowed (as root), else below or beside the process's own (as a user to whom systemd has
delegated it).
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgepeft.errors import CgroupError
from edgepeft.sizes import format_size

from .system import read_kernel, write_kernel

_MOUNTS = Path("/proc/self/mounts")
_OWN = Path("/proc/self/cgroup")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class _Interface:
    """The names of a version's files."""

    limit: str
    swap: str
    peak: str
    events: str


_V2 = _Interface("memory.max", "memory.swap.max", "memory.peak", "memory.events")
_V1 = _Interface(
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
)


class MemoryCgroup:
    """A fresh memory cgroup without swap, removed when the `with` block ends.

    Args:
        limit_bytes: what its processes may hold together, the page cache that they read included.

    Raises:
        CgroupError: the system has no memory cgroups, or this user may make none.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._interface, self._path = _make(limit_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a process is still in it: the system's own cleaning gets it
            self._path.rmdir()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command line that enters the cgroup and then becomes `arguments`.

        A shell does it, rather than a `preexec_fn`, which Python advises against where there are threads.
        """
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._path / "cgroup.procs"), *arguments]

    @property
    def peak_bytes(self) -> int | None:
        """The most its processes held at once; None where the kernel does not say (version 2 before 5.19)."""
        with contextlib.suppress(OSError):
            return int((self._path / self._interface.peak).read_text("ascii"))
        return None

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel has killed because of the limit."""
        words = (self._path / self._interface.events).read_text("ascii").split()
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def drop_page_cache() -> bool:
    """Forget clean file pages that nobody maps, so that a cgroup is charged for every page it reads.

    Returns:
        Whether the system permitted it (root). Pages that were in memory before cost a cgroup nothing.
    """
    if not _DROP_CACHES.exists():
        return False
    os.sync()
    return write_kernel(_DROP_CACHES, "1")


def _make(limit_bytes: int) -> tuple[_Interface, Path]:
    mounts = read_kernel(_MOUNTS)
    if mounts is None:
        raise CgroupError(
            f"no memory cgroup of {format_size(limit_bytes)} can be made: only Linux has them, and only "
            "where /proc shows its mounts"
        )
    reason = "the system has no memory controller mounted"
    for interface, parent in _parents(mounts):
        path = parent / f"edgepeft-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir()
        except OSError as error:
            reason = f"{path}: {error.strerror}"
            continue
        try:
            (path / interface.limit).write_text(str(limit_bytes), "ascii")
            if (path / interface.swap).exists():
                swap = "0" if interface is _V2 else str(limit_bytes)
                (path / interface.swap).write_text(swap, "ascii")
            return interface, path
        except OSError as error:
            path.rmdir()
            reason = f"{path}: {error.strerror}"
    raise CgroupError(
        f"no memory cgroup of {format_size(limit_bytes)} can be made ({reason}): run as root, or in a scope "
        "that systemd delegates (systemd-run --user --scope -p Delegate=yes)"
    )


def _parents(mounts: str) -> Iterator[tuple[_Interface, Path]]:
    """Where a memory cgroup might be made, the best place first."""
    for interface, mount in _hierarchies(mounts):
        own = mount / _own_path(interface).lstrip("/")
        for parent in dict.fromkeys((mount, own, own.parent)):
            if not parent.is_relative_to(mount):
                continue
            if interface is _V2:
                # Children have the memory files only where the parent passes the controller on.
                write_kernel(parent / "cgroup.subtree_control", "+memory")
            yield interface, parent


def _hierarchies(mounts: str) -> Iterator[tuple[_Interface, Path]]:
    """The mounts that have the memory controller."""
    for line in mounts.splitlines():
        _, target, kind, options, *_ = line.split()
        path = Path(target)
        if kind == "cgroup" and "memory" in options.split(","):
            yield _V1, path
        elif kind == "cgroup2" and "memory" in (read_kernel(path / "cgroup.controllers") or "").split():
            yield _V2, path


def _own_path(interface: _Interface) -> str:
    """The process's own cgroup, from the root of the hierarchy."""
    for line in (read_kernel(_OWN) or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if (number == "0") if interface is _V2 else ("memory" in controllers.split(",")):
            return path
    return "/"
