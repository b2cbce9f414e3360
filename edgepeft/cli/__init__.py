"""The `edgepeft` command: one module a subcommand, imported when it is called.

Everything below raises; only this module ends a process, with what `Console` makes of an error and an exit
code (see `edgepeft.errors`): 0 done, 1 failed, 2 usage, 3 budget cannot be met, 4 update rejected by its
gate, 130 and 143 ended by Ctrl-C and by SIGTERM.
"""

import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

import edgepeft

from ..errors import EdgePeftError, UsageError
from .bus_errors import tell_bus_errors
from .console import Console
from .group import Group
from .streams import take_every_character

COMMANDS = ("export", "inspect", "plan", "generate", "predict", "adapt", "adapter", "bench")


class _Commands(Group):
    """Looks up `edgepeft.cli.NAME` and the command NAME in it."""

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

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "edgepeft",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line (this process's where `args` is None) and end the process with its exit code."""
        del standalone_mode
        take_every_character()
        words = sys.argv[1:] if args is None else list(args)
        with Console(words) as console:
            tell_bus_errors(console)
            options = {"windows_expand_args": windows_expand_args, "obj": console, **extra}
            try:
                code = super().main(args, prog_name, complete_var, False, **options)
            except (EdgePeftError, click.ClickException, OSError) as error:
                code = console.fail(error)
            except Exception as error:  # a fault of the program's, whose traceback is wanted
                if console.as_json:
                    console.fail(error)
                raise
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand. An interrupt ends here, before click says something of its own about it."""
        console: Console = ctx.obj
        try:
            super().invoke(ctx)
            console.finish()
        except UsageError as error:
            error.args = (_with_option(str(error), self._asked_for(ctx)),)
            raise
        except click.UsageError as error:
            error.ctx = error.ctx or self._asked_for(ctx)
            raise
        except KeyboardInterrupt as interrupted:
            ctx.exit(console.fail(interrupted))
        except Exception:
            if console.interrupts.raised is None:
                raise
            ctx.exit(console.fail(console.interrupts.raised))

    def _asked_for(self, ctx: click.Context) -> click.Context:
        """A context of the innermost command that the command line names."""
        command: click.Command = self
        for word in ctx.obj.arguments:
            found = command.get_command(ctx, word) if isinstance(command, click.Group) else None
            if found is None:
                break
            command, ctx = found, click.Context(found, info_name=word, parent=ctx)
        return ctx


def _with_option(message: str, ctx: click.Context) -> str:
    """A message that begins with a parameter, such as `seq_len is 0`, with its option's name instead."""
    options = {param.name: max(param.opts, key=len) for param in ctx.command.params if param.opts}
    return re.sub(r"^(\w+(?= is )|\w+_\w+)", lambda found: options.get(found[0], found[0]), message)


@click.group("edgepeft", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgepeft.__version__)
def main() -> None:
    """Export quantized models with PEFT adapters to ONNX; run and adapt them on a device.

    \b
    Example:
      edgepeft export ./model -o model.edge --rank 8
      edgepeft adapt model.edge --data records.jsonl --budget 256MiB -o my-adapter
    """
