"""What a command says, and to whom: its result on standard output, as text or as one JSON document; progress
and notes on standard error; a failure as one line on standard error, or in the JSON document."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import click

from ..errors import BudgetError, EdgePeftError
from .interrupts import Interrupted, Interrupts
from .progress import Progress


class Console:
    """One run of the program; a command gets it with `click.pass_obj`.

    Args:
        arguments: of the command line.

    Attributes:
        arguments: as given.
        as_json: whether results and failures are JSON. Until the command line is parsed it is a guess, for
            the failures of parsing it.
        interrupts: Ctrl-C and SIGTERM.
        progress: what is being done.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.as_json = "--json" in arguments
        self.interrupts = Interrupts()
        self.progress = Progress()
        self.arguments = list(arguments)
        self._result: Any = None
        self._indent: int | None = 1
        self._list_is_open = False  # of the JSON document, whose beginning is written

    def __enter__(self) -> Self:
        self.interrupts.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.progress.close()
        self.interrupts.__exit__(*raised)

    def show(self, result: Any, text: Callable[[Any], str], *, indent: int | None = 1) -> None:
        """Give the command's result, once: as text now, or as JSON when the command ends.

        Args:
            result: JSON values; a dict where the command may fail after it.
            text: makes what people read of it.
            indent: of the JSON; None puts it on one line.
        """
        self.progress.close()
        if self.as_json:
            self._result, self._indent = result, indent
        else:
            click.echo(text(result))

    def write_items(self, items: Sequence[Any], name: str, before: dict[str, Any]) -> None:
        """Write some more items of a list that JSON has at the end of its document, for results that are too
        many to be held.

        Args:
            items: JSON values.
            name: of the list.
            before: what the document has before the list.
        """
        text = json.dumps(items)[1:-1]
        if not self._list_is_open:
            text = f'{json.dumps(before)[:-1]}, "{name}": [{text}'
        elif text:
            text = f", {text}"
        self._list_is_open, self._indent = True, None
        click.echo(text, nl=False)

    def write_text(self, text: str) -> None:
        """Write some of a result that people read; at a terminal there is no more progress beside it."""
        if sys.stdout is not None and sys.stdout.isatty():
            self.progress.close()
        click.echo(text)

    def note(self, text: str) -> None:
        """Say something beside the result."""
        click.echo(text, err=True)

    def finish(self) -> None:
        """Write the JSON document of a command that has gone well."""
        if self._result is not None:
            self._write_json(self._result)

    def fail(self, error: BaseException) -> int:
        """Say why a command failed; returns the exit code."""
        self.progress.close()
        told = _told(error)
        if self.as_json:
            result = self._result if isinstance(self._result, dict) else {}
            self._write_json({**result, "error": told})
        else:
            go_on = f"; go on with:\n{told['go_on']}" if "go_on" in told else ""
            click.echo(f"error: {told['message']}{go_on}", err=True)
        return int(told["exit_code"])

    def _write_json(self, document: Any) -> None:
        """Write the document, or what follows its list."""
        text = json.dumps(document, indent=self._indent)
        click.echo(f"], {text[1:]}" if self._list_is_open else text)

    def command_line(self, *more: str) -> str:
        """The command line of this run, for a shell, with options put in that it lacks."""
        words = list(self.arguments)
        end = words.index("--") if "--" in words else len(words)
        words[end:end] = [option for option in more if option not in words]
        return _quoted([*_program(), *words])


def _told(error: BaseException) -> dict[str, Any]:
    """What is said of a failure, as JSON values."""
    kind, message, exit_code = type(error).__name__, str(error), 1
    more: dict[str, Any] = {}
    if isinstance(error, EdgePeftError):
        exit_code = error.exit_code
        if isinstance(error, BudgetError):
            more = {"budget_bytes": error.budget_bytes, "required_bytes": error.required_bytes}
    elif isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        path = context.command_path if context else "edgepeft"
        kind, message = "UsageError", f"{error.format_message()} (see {path} --help)"
        exit_code = error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        interrupted = error if isinstance(error, Interrupted) else Interrupted()
        kind, message, exit_code = "Interrupted", interrupted.message, interrupted.exit_code
        more = {} if interrupted.go_on is None else {"go_on": interrupted.go_on}
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return {"type": kind, "message": " ".join(message.split()), "exit_code": exit_code, **more}


def _quoted(words: list[str]) -> str:
    """A command line of these words, as the system's shell reads it."""
    if sys.platform != "win32":
        return shlex.join(words)
    import subprocess

    return subprocess.list2cmdline(words)


def _program() -> list[str]:
    """The words that start this program once more."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return [sys.executable, "-m", "edgepeft.cli"]
    found = shutil.which(path.name)
    on_path = found is not None and Path(found).resolve() == path.resolve()
    return [path.name if on_path else str(path)]
