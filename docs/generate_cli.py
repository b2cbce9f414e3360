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
        with click.Context(
            command, info_name=name, parent=context, max_content_width=WIDTH, terminal_width=WIDTH
        ) as child:
            parts.append(f"## edgepeft {name}\n\n```\n{command.get_help(child)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PATH.write_text(cli_reference(), encoding="utf-8")
