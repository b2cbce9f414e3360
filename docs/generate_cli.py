"""Writes `docs/cli.md` from the commands' own help: `python docs/generate_cli.py`."""

from pathlib import Path

import click

from edgepeft.cli import main

PATH = Path(__file__).with_name("cli.md")
HEADER = """# The `edgepeft` command

Generated from the commands' help by `make docs`; a test compares it.

Sizes read `96MiB`, `128MB`, `0.5GiB`.

| exit code | |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage |
| 3 | the memory budget cannot be met |
| 4 | the update was rejected by its held-out records |
| 130, 143 | ended by Ctrl-C (SIGINT), by SIGTERM |

Results go to standard output. A failure is one line on standard error that begins with `error:`. With
`--json`, standard output is exactly one JSON document, also after a failure: `{"error": {"type", "message",
"exit_code"}}`, of a budget with `budget_bytes` and `required_bytes`, of an interrupted update with `go_on`,
and beside the result where there is one (a plan that does not fit, a rejected update). Standard error then
has nothing but progress.

What takes more than two seconds says on standard error what it is doing: in one line at a terminal, elsewhere
in a line every five seconds; `adapt` says its first and its last step always.

Ctrl-C, or SIGTERM, ends a command in one line and leaves what was there before. `adapt` finishes its step,
saves a checkpoint and prints the command that goes on with it, to the same bits. A second one ends at once.

`-` in place of a file of records is standard input. A file that a record names (`{"image"}`, `{"audio"}`,
`.npy`) is found from the folder of the data file, unless its path is absolute; from the working directory
where the records come from standard input, or from Python.
"""
WIDTH = 100


def cli_reference() -> str:
    """The whole page."""
    parts = [HEADER]
    context = click.Context(main, info_name="edgepeft", **main.context_settings)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        parts += _sections(command, name, context)
    return "\n".join(parts)


def _sections(command: click.Command, name: str, parent: click.Context) -> list[str]:
    """A command's help, and that of its own commands."""
    with click.Context(
        command, info_name=name, parent=parent, max_content_width=WIDTH, terminal_width=WIDTH
    ) as context:
        parts = [f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"]
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                assert found is not None
                parts += _sections(found, child, context)
    return parts


if __name__ == "__main__":
    PATH.write_text(cli_reference(), encoding="utf-8")
