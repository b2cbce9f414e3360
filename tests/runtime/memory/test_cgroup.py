"""The limit of a memory cgroup is the kernel's, not ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.errors import CgroupError
from edgepeft.runtime.memory import cgroup

MIB = 2**20
ALLOCATE = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096])"


@pytest.fixture
def group():
    """A cgroup of 96 MiB; root has them, and users to whom one is delegated."""
    try:
        made = cgroup.MemoryCgroup(96 * MIB)
    except CgroupError as error:
        pytest.skip(str(error))
    with made:
        yield made


def allocate(group: cgroup.MemoryCgroup, size_bytes: int) -> int:
    """The exit status of a process in the cgroup that writes to so much memory."""
    command = [sys.executable, "-c", ALLOCATE, str(size_bytes)]
    return subprocess.run(group.command(command), check=False).returncode


def test_what_fits_runs_and_is_counted(group: cgroup.MemoryCgroup) -> None:
    """The peak is the process's, which holds 32 MiB and an interpreter."""
    assert allocate(group, 32 * MIB) == 0
    assert group.oom_kills == 0
    peak_bytes = group.peak_bytes
    assert peak_bytes is None or 32 * MIB < peak_bytes <= 96 * MIB


def test_what_does_not_fit_is_killed_by_the_kernel(group: cgroup.MemoryCgroup) -> None:
    """And the cgroup says so."""
    assert allocate(group, 160 * MIB) == -9
    assert group.oom_kills == 1


def test_a_cgroup_is_removed(group: cgroup.MemoryCgroup) -> None:
    """With the block that used it."""
    path = group._path
    assert path.is_dir()
    group.__exit__(None, None, None)
    assert not path.exists()


def test_where_there_are_none_the_error_says_what_would_help(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another system, and one that mounts none."""
    monkeypatch.setattr(cgroup, "_MOUNTS", tmp_path / "mounts")
    with pytest.raises(CgroupError, match="only Linux has them"):
        cgroup.MemoryCgroup(MIB)
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    with pytest.raises(CgroupError, match=r"no memory controller mounted.*as root"):
        cgroup.MemoryCgroup(MIB)


def test_a_page_cache_that_cannot_be_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On another system, which need not have `os.sync` either; and without the right to."""
    monkeypatch.setattr(cgroup, "_DROP_CACHES", tmp_path / "none")
    monkeypatch.delattr(os, "sync", raising=False)
    assert not cgroup.drop_page_cache()


def test_version_2_passes_the_controller_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of a hierarchy that is only a folder: what is written is what the kernel's manual asks for."""
    root = tmp_path / "cgroup"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "mounts").write_text(f"none {root} cgroup2 rw 0 0\n")
    (tmp_path / "own").write_text("0::/user.slice/app.slice\n")
    monkeypatch.setattr(cgroup, "_MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")
    made = cgroup.MemoryCgroup(5 * MIB)
    assert (root / "cgroup.subtree_control").read_text() == "+memory"
    assert (made._path / "memory.max").read_text() == str(5 * MIB)
    (made._path / "memory.peak").write_text("123\n")
    (made._path / "memory.events").write_text("low 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert (made.peak_bytes, made.oom_kills) == (123, 1)
