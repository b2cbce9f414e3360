"""`edgepeft generate`: continue a text."""

import json

import click

from edgepeft.cli.options import (
    adapter_spec,
    adapters_option,
    budget_option,
    bundle_argument,
    check_floor,
    json_option,
)


@click.command(short_help="Continue a text.")
@bundle_argument()
@click.option("--prompt", required=True, help="Text to continue.")
@adapters_option()
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Tokens to write at most.")
@budget_option()
@json_option()
def generate(
    bundle: str,
    prompt: str,
    adapters: tuple[str, ...],
    max_new_tokens: int,
    budget: int | None,
    as_json: bool,
) -> None:
    """Continue a text greedily with the language model in BUNDLE.

    \b
    Example:
      edgepeft generate model.edge --prompt "Dear Sir," --adapter mine=0.7 --adapter other=0.3
    """
    check_floor(budget)
    from edgepeft.runtime import load

    spec = adapter_spec(adapters)
    with load(bundle, memory_budget=budget) as model:
        text = model.generate(prompt, adapter=spec, max_new_tokens=max_new_tokens)
    click.echo(json.dumps({"prompt": prompt, "adapter": spec, "text": text}, indent=1) if as_json else text)
