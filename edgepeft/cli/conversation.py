"""A conversation at the terminal: a line is a message, the answer comes as it is written."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import click

from ..errors import ContextError

PROMPT = "> "


def lines() -> Iterator[str]:
    """What somebody types, line by line, until the end of input or an interrupt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and editing)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input(PROMPT).strip()
            if line:
                yield line
    click.echo()


def converse(model: Any, messages: list[dict[str, str]], prompt_cache: Any, asked: dict[str, Any]) -> None:
    """Answer line after line; an interrupt ends an answer, and at the prompt the conversation.

    Args:
        model: the loaded bundle.
        messages: what was said before, such as a system message; the conversation is added to it.
        prompt_cache: what the conversation begins with, if that was read before; then every answer goes on
            from the one before.
        asked: what else `Model.stream` takes.
    """
    for line in lines():
        messages.append({"role": "user", "content": line})
        try:
            stream = _fitting(model, messages, {**asked, "prompt_cache": prompt_cache})
        except ContextError as error:
            click.echo(f"error: {error}", err=True)
            messages.pop()
            continue
        prompt_cache = None
        with contextlib.suppress(KeyboardInterrupt):
            write(stream)
        messages.append({"role": "assistant", "content": stream.result.text})
        prompt_cache = stream.prompt_cache


def _fitting(model: Any, messages: list[dict[str, str]], asked: dict[str, Any]) -> Any:
    """The stream of the answer to as much of a conversation as the model's context holds: its oldest messages
    are taken out of it, but the system's."""
    kept = list(messages)
    while True:
        try:
            stream = model.stream(messages=kept, keep=True, **asked)
        except ContextError:
            oldest = next(index for index, message in enumerate(kept) if message["role"] != "system")
            if oldest == len(kept) - 1:
                raise
            del kept[oldest : oldest + 2]
        else:
            if len(kept) < len(messages):
                click.echo("(the beginning no longer fits the model's context and is left out)", err=True)
                messages[:] = kept
            return stream


def write(stream: Any, before: Callable[[], None] = lambda: None) -> None:
    """Write a stream to the terminal as it comes; whatever ends it ends the line, too.

    Args:
        stream: pieces of text.
        before: called before the first one.
    """
    with stream:
        try:
            for number, piece in enumerate(stream):
                if number == 0:
                    before()
                click.echo(piece, nl=False)
        finally:
            click.echo()
