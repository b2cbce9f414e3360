"""Commands in a memory cgroup of a fixed size, so that the kernel's accounting and its limit are what a test
compares with."""

import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


class NoCgroupError(Exception):
    """This process cannot make memory cgroups."""


def run_limited(command: Sequence[str], limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run a command whose memory, page cache included, the kernel keeps below a limit.

    The page cache is dropped first where that is permitted, so that the file pages that the command reads
    are charged to it. A command that cannot do with the limit is killed (return code -9).

    Args:
        command: the program and its arguments.
        limit_bytes: the limit; there is no swap.

    Raises:
        NoCgroupError: the system has none, or does not let this user make one.
    """
    with _group(limit_bytes) as group:
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        except OSError as error:
            raise NoCgroupError("the page cache cannot be dropped") from error
        procs = group / "cgroup.procs"
        # A shell joins the group and becomes the command.
        shell = ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh", *command]
        return subprocess.run(shell, capture_output=True, text=True, check=False)


@contextmanager
def _group(limit_bytes: int) -> Iterator[Path]:
    """A new group of cgroup version 2 or 1."""
    version_2 = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if version_2 else _ROOT / "memory") / f"edgepeft-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        raise NoCgroupError(f"{group} cannot be made: {error.strerror}") from error
    try:
        limit, swap = ("memory.max", "memory.swap.max") if version_2 else ("memory.limit_in_bytes", None)
        try:
            (group / limit).write_text(str(limit_bytes))
            if swap is not None and (group / swap).exists():
                (group / swap).write_text("0")
        except OSError as error:
            raise NoCgroupError(f"{group / limit} cannot be set: {error.strerror}") from error
        yield group
    finally:
        group.rmdir()
