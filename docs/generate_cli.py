"""Writes `docs/cli.md` from the commands' own help: `python docs/generate_cli.py`."""

from pathlib import Path

import click

from edgepeft.cli import main

PATH = Path(__file__).with_name("cli.md")
HEADER = """# The `edgepeft` command

Generated from the commands' help by `make docs`; a test compares it.

Sizes read `96MiB`, `128MB`, `0.5GiB`. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the memory budget cannot
be met, 4 the update was rejected by its held-out records. A failure is one line on standard error that begins
with `error:`.
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
