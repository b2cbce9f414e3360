"""The `edgepeft` command: one module a subcommand, imported when it is called.

Everything below raises; only this module turns an error into one line on stderr and an exit code (see
`edgepeft.errors`): 0 done, 1 failed, 2 usage, 3 budget cannot be met, 4 update rejected by its gate.
"""

import importlib
from typing import Any

import click

from edgepeft.cli.streams import take_every_character
from edgepeft.errors import EdgePeftError

COMMANDS = ("export", "inspect", "plan", "generate", "predict", "adapt", "adapter", "bench")


class _Commands(click.Group):
    """Looks up `edgepeft.cli.NAME` and the command NAME in it."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run as a program, whatever characters it has to print."""
        take_every_character()
        return super().main(*arguments, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of use."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand; its own imports of heavy packages wait until it runs."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"edgepeft.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand and report what it raises."""
        try:
            return super().invoke(ctx)
        except EdgePeftError as error:
            _fail(str(error), error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "edgepeft"
            _fail(f"{error.format_message()} (see {path} --help)", 2)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(exit_code)


@click.group("edgepeft", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgepeft")
def main() -> None:
    """Export quantized models with PEFT adapters to ONNX; run and adapt them on a device.

    \b
    Example:
      edgepeft export ./model -o model.edge --rank 8
      edgepeft adapt model.edge --data records.jsonl --budget 256MiB -o my-adapter
    """
