"""Options of `edgepeft generate` that say how tokens are chosen and where an answer ends; they have the names
of `GenerationOptions`."""

import click

from .options import Decorator, all_of


def generation_options() -> Decorator:
    """What `Model.generate` takes as `**options`."""
    options = (
        click.option(
            "--max-new-tokens", type=int, default=64, show_default=True, help="Tokens to write at most."
        ),
        click.option(
            "--temperature",
            type=float,
            help="Above 0, draw each token, with logits divided by this; 0 takes the most likely one. The "
            "model's own setting, or 0.",
        ),
        click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens."),
        click.option(
            "--top-p", type=float, help="Draw among the likeliest tokens that together have this probability."
        ),
        click.option(
            "--min-p",
            type=float,
            help="Draw among tokens with at least this share of the likeliest one's probability.",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            help="Above 1, make tokens that the text holds less likely; the model's own setting, or 1.",
        ),
        click.option("--seed", type=int, help="Of the draws: the same seed gives the same text."),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="End before this text; repeat it for several.",
        ),
    )
    return all_of(options)
