"""The simulated systems lack what they are said to lack: else what passes there would prove nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from . import SYSTEMS, environment


def fails(system: str, program: str, folder: Path) -> str:
    """The last line of what a program says that fails in a process of its own."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(system), capture_output=True, text=True, cwd=folder)
    return done.stderr.splitlines()[-1] if done.returncode else ""


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    "path", ["/proc/self/status", "/proc/self/maps", "/sys/kernel/mm/transparent_hugepage/enabled"]
)
def test_the_kernels_files_are_hidden(system: str, path: str, tmp_path: Path) -> None:
    assert fails(system, f"open({path!r})", tmp_path).startswith("FileNotFoundError")


ADVISED = """
import mmap, sys
memory = mmap.mmap(-1, mmap.PAGESIZE)
memory[0] = 1
memory.madvise(mmap.MADV_DONTNEED)
sys.exit("hint" if memory[0] == 1 else 0)
"""
OPEN_FILE = "open('file', 'w').close(); file = open('file'); import os; "
MAPPED_FILE = """
import mmap, os
open('file', 'w').write('x')
with open('file') as file:
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
"""


@pytest.mark.parametrize(
    ("system", "program", "expected"),
    [
        ("windows", "import resource", "ModuleNotFoundError"),
        ("windows", "import ctypes; ctypes.CDLL(None)", "TypeError"),
        ("windows", "import os; os.open('.', os.O_RDONLY)", "PermissionError"),
        ("windows", ADVISED, "AttributeError"),
        ("windows", "import os; os.posix_fallocate", "AttributeError"),
        ("windows", OPEN_FILE + "os.replace('file', 'other')", "PermissionError"),
        ("windows", OPEN_FILE + "open('new', 'w').close(); os.replace('new', 'file')", "PermissionError"),
        ("windows", MAPPED_FILE + "os.remove('file')", "PermissionError"),
        ("windows", MAPPED_FILE + "os.rename('.', '../moved')", "PermissionError"),
        ("windows", OPEN_FILE + "file.close(); os.replace('file', 'other')", ""),
        ("macos", ADVISED, "hint"),
        ("macos", "import os; os.posix_fallocate", "AttributeError"),
        ("macos", OPEN_FILE + "os.replace('file', 'other')", ""),
        ("bare", ADVISED, "OSError: [Errno 22] Invalid argument"),
        ("bare", "import psutil", "ModuleNotFoundError"),
    ],
)
def test_what_a_system_lacks_fails(system: str, program: str, expected: str, tmp_path: Path) -> None:
    """As it does on the real one; what it has works."""
    said = fails(system, program, tmp_path)
    assert said.startswith(expected) if expected else said == ""
