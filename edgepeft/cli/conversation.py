"""A conversation at the terminal: a line is a message, the answer comes as it is written."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import click

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


def converse(messages: list[dict[str, str]], open_stream: Callable[[list[dict[str, str]]], Any]) -> None:
    """Answer line after line; an interrupt ends an answer, and at the prompt the conversation.

    Args:
        messages: what was said before, such as a system message; the conversation is added to it.
        open_stream: the stream of the answer to a conversation.
    """
    for line in lines():
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": write(open_stream(messages)).text})


def write(stream: Any) -> Any:
    """Write a stream to the terminal as it comes; its result. An interrupt ends it."""
    with stream:
        try:
            for piece in stream:
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            stream.close()
        click.echo()
        return stream.result
