"""Files and folders appear whole, or what was there stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepeft import files
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import (
    _exchange,
    atomic_file,
    atomic_folder,
    atomic_path,
    atomic_write,
    check_replaceable,
    temporary_folder,
)

FULL = Path("/dev/full")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_replaces_the_old_one(tmp_path: Path) -> None:
    """And leaves nothing else behind, with the permissions any new file has."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt", "other"]
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file and says that nothing changed."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgePeftError, match=r"a\.txt: the disk is full .*nothing was changed") as caught:
        atomic_write(path, b"new")
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_in_the_middle_of_a_folder(tmp_path: Path) -> None:
    """The kernel's own ENOSPC, while a folder is being filled."""
    folder = tmp_path / "out"
    with atomic_folder(folder, "marker") as temporary:
        (temporary / "marker").write_bytes(b"first")

    def fill() -> None:
        with atomic_folder(folder, "marker") as temporary, FULL.open("wb") as file:
            (temporary / "marker").write_bytes(b"second")
            file.write(b"x")

    with pytest.raises(EdgePeftError, match="the disk is full"):
        fill()
    assert (folder / "marker").read_bytes() == b"first"
    assert names(tmp_path) == ["out"]


def test_an_exception_in_the_block_leaves_what_was_there(tmp_path: Path) -> None:
    """Also for errors that have nothing to do with the disk."""
    for failing in (atomic_file(tmp_path / "a"), atomic_folder(tmp_path / "b", "marker")):
        with pytest.raises(ZeroDivisionError), failing:
            raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_folder_is_exchanged_whole(tmp_path: Path) -> None:
    """Nothing of the old folder stays in the new one."""
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "out", "marker") as temporary:
            (temporary / "marker").write_text(content)
            (temporary / content).write_text("")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["marker", "second"]


def test_a_failed_exchange_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two renames fails, where there is no exchange in one step."""
    monkeypatch.setattr("edgepeft.files._exchange", lambda *_: False)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "marker").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Any) -> Path:
        if Path(target) == folder and self.name != ".out.previous":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EdgePeftError, match="nothing was changed"), atomic_folder(folder, "marker"):
        pass
    assert (folder / "marker").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path: Path) -> None:
    """A process that died there left `.NAME.previous`, which the next call restores first."""
    previous = tmp_path / ".out.previous"
    previous.mkdir()
    (previous / "marker").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", "marker"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "marker").read_text() == "old"


def test_there_is_a_folder_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old and the new one change places in one step, where the system has that."""
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    if not _exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("there are two renames here")
    (tmp_path / "one").rmdir()
    (tmp_path / "other").rmdir()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "marker").write_text("old")

    def refused(*_: object) -> None:
        raise AssertionError("renamed")

    monkeypatch.setattr(Path, "rename", refused)
    with atomic_folder(folder, "marker") as temporary:
        (temporary / "marker").write_text("new")
    assert (folder / "marker").read_text() == "new"
    assert names(tmp_path) == ["out"]


HALF_WAY = """
import os, signal, sys
from pathlib import Path
from edgepeft.files import _exchange, atomic_file, atomic_folder
out = Path(sys.argv[1])
with atomic_folder(out / "folder", "marker") as folder, atomic_file(out / "file") as file:
    (folder / "marker").write_text("half")
    file.write(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_nobody_elses(tmp_path: Path) -> None:
    """One process writes and another one does, to the same place; then the first is killed."""
    pytest.importorskip("fcntl", reason="there are no such locks")
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"ready\n"
        half = names(tmp_path)
        assert len(half) == 2

        def write() -> None:
            atomic_write(tmp_path / "file", b"whole")
            with atomic_folder(tmp_path / "folder", "marker") as temporary:
                (temporary / "marker").write_text("whole")

        write()
        assert names(tmp_path) == sorted([*half, "file", "folder"])
        first.kill()
    write()
    assert names(tmp_path) == ["file", "folder"]


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    """The folder behind it is replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "link", "marker") as temporary:
            (temporary / "marker").write_text(content)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "marker").read_text() == "second"
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A file, a folder of something else, a link."""
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = names(tmp_path)
    with pytest.raises(UsageError, match=r"out: exists and holds no marker"), atomic_folder(path, "marker"):
        pass
    assert names(tmp_path) == before


def test_nothing_is_open_when_a_file_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows renames no open file; the one that a library writes by its name is flushed too."""
    psutil = pytest.importorskip("psutil")
    flushed: list[int] = []
    opened: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    replace = Path.replace

    def spied(self: Path, target: Path) -> Path:
        opened.append([file.path for file in psutil.Process().open_files() if str(tmp_path) in file.path])
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spied)
    atomic_write(tmp_path / "one", b"four")
    with atomic_path(tmp_path / "two") as temporary:
        temporary.write_bytes(b"seven b")
    assert names(tmp_path) == ["one", "two"]
    assert opened == [[], []]
    assert {4, 7} <= set(flushed)


@pytest.mark.parametrize("code", [5, 32, 1224])
def test_what_windows_does_not_replace_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A file that is open or mapped, such as the weights of a loaded bundle."""

    def refused(*_: object) -> None:
        error = PermissionError(errno.EACCES, "Access is denied")
        error.winerror = code  # type: ignore[attr-defined]  (on Windows every OSError has one)
        raise error

    monkeypatch.setattr(Path, "rename", refused)
    with (
        pytest.raises(EdgePeftError, match="nothing was changed: close what has it open, such as a model"),
        atomic_folder(tmp_path / "out", "marker"),
    ):
        pass
    assert names(tmp_path) == []


def test_folders_need_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows they cannot be, so a rename is not flushed there."""

    def refused(path: Path, flags: int) -> None:
        del flags
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("edgepeft.files.os.open", refused)
    atomic_write(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    """The parent is a file."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EdgePeftError, match=r"x: cannot be written"),
        atomic_folder(tmp_path / "file" / "x", "m"),
    ):
        pass


def test_temporary_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next one; nobody else can look into one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / ".edgepeft.0123456789ab").mkdir()
    (tmp_path / ".edgepeft.0123456789ab" / "features").write_bytes(b"x")
    with temporary_folder() as folder, temporary_folder() as other:
        assert folder != other
        assert folder.stat().st_mode & 0o777 == 0o700
        pytest.importorskip("fcntl", reason="there are no such locks")
        assert names(tmp_path) == sorted([folder.name, other.name])
    assert names(tmp_path) == []


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written, .*file is no folder: give another path"):
        check_replaceable(tmp_path / "file" / "below" / "out", "manifest.json")
    check_replaceable(tmp_path / "new" / "out", "manifest.json")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_just_made_and_is_not_held_yet_may_be_taken_for_a_leftover(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exports at once: one cleans up at the moment at which the other has made its folder."""
    pytest.importorskip("fcntl", reason="there are no such locks, and what is young is left alone")
    lock, removed = files._locked, []

    def late(path: Path, *, wait: bool) -> int | None:
        if not removed and path.parent == tmp_path:
            removed.append(path)
            files.remove_leftovers(tmp_path, "it")
            assert not path.exists()
        return lock(path, wait=wait)

    monkeypatch.setattr(files, "_locked", late)
    if kind == "file":
        with files.atomic_file(tmp_path / "it") as file:
            file.write(b"whole")
        assert (tmp_path / "it").read_bytes() == b"whole"
    else:
        with files.scratch_folder(tmp_path / "it") as folder:
            (folder / "inside").write_bytes(b"whole")
    assert removed
    assert [path.name for path in tmp_path.iterdir()] == (["it"] if kind == "file" else [])
