"""`edgepeft generate`: continue a text, or answer in a conversation."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from edgepeft.cli.conversation import converse, write
from edgepeft.cli.generation_options import generation_options
from edgepeft.cli.options import (
    adapter_spec,
    adapters_option,
    budget_option,
    bundle_argument,
    check_floor,
    json_option,
)
from edgepeft.cli.streams import read_standard_input
from edgepeft.errors import UsageError


@click.command(short_help="Continue a text, or chat.")
@bundle_argument()
@click.option("--prompt", help="Text to continue, or to answer with --chat; - reads it from standard input.")
@click.option(
    "--chat",
    is_flag=True,
    help="Put the prompt into the model's chat template; without one, converse at the terminal.",
)
@click.option("--system", metavar="TEXT", help="With --chat: the system message that comes first.")
@adapters_option()
@generation_options()
@click.option(
    "--stream/--no-stream",
    "stream",
    default=None,
    help="Print the text as it is written, or at the end; as it is written where that is a terminal.",
)
@click.option(
    "--prompt-cache",
    type=click.Path(),
    metavar="FILE",
    help="Do not read again what the prompt has in common with this file's.",
)
@click.option(
    "--save-prompt-cache",
    type=click.Path(),
    metavar="FILE",
    help="Read the prompt, write this file for --prompt-cache, and generate nothing.",
)
@click.option(
    "--int8-activations",
    is_flag=True,
    help="Round activations to 8 bits: faster, and logits move by a few percent of their spread.",
)
@budget_option()
@json_option()
def generate(
    bundle: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    adapters: tuple[str, ...],
    stream: bool | None,
    prompt_cache: str | None,
    save_prompt_cache: str | None,
    int8_activations: bool,
    budget: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a text with the language model in BUNDLE, or answer in a conversation.

    \b
    Example:
      edgepeft generate model.edge --prompt "Dear Sir," --adapter mine=0.7 --adapter other=0.3
      edgepeft generate model.edge --chat --system "Be brief." --temperature 0.8 --top-p 0.95
    """
    check_floor(budget)
    if system is not None and not chat:
        raise UsageError("--system is part of a conversation: give --chat as well")
    if prompt is None and not (chat and sys.stdin.isatty() and not save_prompt_cache and not as_json):
        raise UsageError("there is no --prompt: give a text, or - to read it from standard input")
    text = read_standard_input().removesuffix("\n") if prompt == "-" else prompt
    spec = adapter_spec(adapters)
    messages = [{"role": "system", "content": system}] if system is not None else []
    from edgepeft.runtime import load

    with load(bundle, memory_budget=budget, int8_activations=int8_activations) as model:
        if text is None:
            converse(model, messages, prompt_cache, {**options, "adapter": spec})
            return
        asked: dict[str, Any] = (
            {"messages": [*messages, {"role": "user", "content": text}]} if chat else {"prompt": text}
        )
        if save_prompt_cache:
            read = model.read_prompt(**asked, adapter=spec)
            read.save(save_prompt_cache)
            summary = {"prompt_tokens": len(read.ids), "nbytes": Path(save_prompt_cache).stat().st_size}
            click.echo(
                json.dumps({"file": save_prompt_cache, **summary}, indent=1)
                if as_json
                else f"{save_prompt_cache}: {summary['prompt_tokens']} tokens, {summary['nbytes']:,} B"
            )
            return
        answer = model.stream(**asked, adapter=spec, prompt_cache=prompt_cache, **options)
        if not as_json and (sys.stdout.isatty() if stream is None else stream):
            write(answer)
            return
        for _ in answer:
            pass
        result = answer.result
    if as_json:
        told = dataclasses.asdict(result)
        told["new_tokens"] = len(told.pop("ids"))
        click.echo(json.dumps({"prompt": text, "adapter": spec, **told}, indent=1))
    else:
        click.echo(result.text)
