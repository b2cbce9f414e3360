"""What a system's shell and its encoding make of what is written and read."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.cli.console import _quoted
from edgepeft.cli.streams import read_standard_input, take_every_character
from edgepeft.errors import UsageError

from ..runtime import tiny

TEXT = "größe-你好-🙂"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_pipe_gets_utf_8(tmp_path: Path, encoding: str) -> None:
    """Whatever Python would have written to it, such as Windows's code page."""
    bundle = tiny.write_bundle(tmp_path / TEXT)
    command = [sys.executable, "-m", "edgepeft.cli", "adapter", "export", str(bundle), "mine", "-o"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, str(tmp_path / f"{TEXT}-2")], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == f"wrote {tmp_path / TEXT}-2"
    failed = subprocess.run([*command[:-2], "none", "-o", "x"], env=environment, capture_output=True)
    assert failed.stderr.decode().startswith(f"error: {bundle}: has no adapter 'none'")


class Terminal(io.TextIOWrapper):
    """A terminal of some encoding."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_a_terminal_keeps_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What that has not is an escape, and no error."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(written, "cp1252"))
    take_every_character()
    sys.stdout.write(TEXT)
    sys.stdout.flush()
    assert written.getvalue() == b"gr\xf6\xdfe-\\u4f60\\u597d-\\U0001f642"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_standard_input_is_utf_8(monkeypatch: pytest.MonkeyPatch, mark: bytes) -> None:
    """With Windows's ends of lines and byte order mark or without; another encoding is said to be one."""
    data = mark + TEXT.encode() + b"\r\nnext\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "cp1252"))
    assert read_standard_input() == f"{TEXT}\nnext\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe".encode("latin-1")), "utf-8"))
    with pytest.raises(UsageError, match="standard input is not UTF-8"):
        read_standard_input()


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", "edgepeft 'my model.edge' -x"), ("win32", 'edgepeft "my model.edge" -x')],
)
def test_a_command_line_to_go_on_with(monkeypatch: pytest.MonkeyPatch, platform: str, expected: str) -> None:
    """In the quotes of the system's shell: Windows's knows no single ones."""
    monkeypatch.setattr(sys, "platform", platform)
    assert _quoted(["edgepeft", "my model.edge", "-x"]) == expected
