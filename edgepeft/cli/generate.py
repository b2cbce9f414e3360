"""`edgepeft generate`: continue a text, or answer in a conversation."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .console import Console
from .conversation import converse, write
from .generation_options import generation_options
from .options import (
    adapter_spec,
    adapters_option,
    budget_option,
    bundle_argument,
    check_floor,
    force_option,
    json_option,
)
from .streams import read_standard_input


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
@force_option()
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
@click.pass_obj
def generate(
    console: Console,
    /,
    bundle: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    adapters: tuple[str, ...],
    force: bool,
    stream: bool | None,
    prompt_cache: str | None,
    save_prompt_cache: str | None,
    int8_activations: bool,
    budget: int | None,
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
    if prompt is None and not (chat and sys.stdin.isatty() and not save_prompt_cache and not console.as_json):
        raise UsageError("there is no --prompt: give a text, or - to read it from standard input")
    text = read_standard_input().removesuffix("\n") if prompt == "-" else prompt
    spec = adapter_spec(adapters)
    messages = [{"role": "system", "content": system}] if system is not None else []
    console.progress.stage("opening the bundle")
    from edgepeft.runtime import load

    with load(bundle, memory_budget=budget, int8_activations=int8_activations, force=force) as model:
        if text is None:
            console.progress.close()
            with console.interrupts.suspended():
                converse(model, messages, prompt_cache, {**options, "adapter": spec})
            return
        console.progress.stage("reading the prompt")
        asked: dict[str, Any] = (
            {"messages": [*messages, {"role": "user", "content": text}]} if chat else {"prompt": text}
        )
        if save_prompt_cache:
            read = model.read_prompt(**asked, adapter=spec)
            read.save(save_prompt_cache)
            nbytes = Path(save_prompt_cache).stat().st_size
            console.show(
                {"file": save_prompt_cache, "prompt_tokens": len(read.ids), "nbytes": nbytes}, _written
            )
            return
        answer = model.stream(**asked, adapter=spec, prompt_cache=prompt_cache, **options)
        if not console.as_json and (sys.stdout.isatty() if stream is None else stream):
            write(answer, console.progress.close)
            return
        for count, _ in enumerate(answer, start=1):
            if count == 1:
                console.progress.stage("generating")
            console.progress.update(count, options["max_new_tokens"], "tokens at most")
        told = dataclasses.asdict(answer.result)
    told["new_tokens"] = len(told.pop("ids"))
    console.show({"prompt": text, "adapter": spec, **told}, lambda told: str(told["text"]))


def _written(told: dict[str, Any]) -> str:
    return f"{told['file']}: {told['prompt_tokens']} tokens, {told['nbytes']:,} B"
