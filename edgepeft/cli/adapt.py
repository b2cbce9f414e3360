"""`edgepeft adapt`: train an adapter on this device's records, inside a memory budget."""

import json
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from edgepeft.cli.options import (
    budget_option,
    bundle_argument,
    check_floor,
    json_option,
    memory_options,
    table,
)
from edgepeft.errors import UpdateRejectedError
from edgepeft.sizes import format_size

if TYPE_CHECKING:
    from edgepeft.runtime.training.trainer import Step


@click.command(short_help="Train an adapter within a budget.")
@bundle_argument()
@click.option("--data", required=True, type=click.Path(), help="JSONL file of records to learn from.")
@budget_option(required=True)
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder for the new PEFT adapter.")
@click.option("--adapter", help="Adapter to start from, by name or path; the bundle's first unless given.")
@click.option("--rank", type=int, help="Start a fresh LoRA of this rank on every slot instead.")
@memory_options()
@click.option("--steps", type=int, help="Optimizer steps; --epochs decides unless given.")
@click.option("--epochs", type=int, default=1, show_default=True, help="Passes over the records.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Records computed at once.")
@click.option("--seq-len", type=int, help="Tokens a text is cut to (128 unless given), or samples (160,000).")
@click.option(
    "--lr", "learning_rate", type=float, default=2e-4, show_default=True, help="Peak learning rate."
)
@click.option("--warmup-steps", type=int, default=0, show_default=True, help="Steps of rising learning rate.")
@click.option("--schedule", default="linear", show_default=True, help="linear, cosine or constant.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="AdamW's weight decay.")
@click.option(
    "--drift-weight", type=float, help="Of the drift penalty, where the bundle has one. [default: 0.1]"
)
@click.option(
    "--eval-fraction", type=float, default=0.1, show_default=True, help="Share of records held out."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the split, batches and fresh adapters."
)
@click.option(
    "--strategy",
    help="How to train: resident, streamed, or forward-only, which estimates gradients by forward passes and "
    "needs many more steps. The first with exact gradients that fits unless given.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted update to the same output.")
@json_option()
def adapt(bundle: str, data: str, budget: int, output: str, as_json: bool, **options: Any) -> None:
    """Train an adapter of BUNDLE on the records of a file, and keep it if it is better on held-out ones.

    The result is a PEFT adapter folder. Exit 3: the budget cannot be met. Exit 4: the new adapter is worse,
    and nothing was written.

    \b
    Example:
      edgepeft adapt model.edge --data records.jsonl --budget 256MiB -o my-adapter --steps 100
    """
    check_floor(budget)
    from edgepeft.runtime import load

    with load(bundle, memory_budget=budget) as model, _Progress() as progress:
        try:
            report = model.adapt(data, output, on_step=progress.update, **options).to_dict()
        except UpdateRejectedError as error:
            if as_json and error.report is not None:
                click.echo(json.dumps(error.report, indent=1))
            raise
    click.echo(json.dumps(report, indent=1) if as_json else _table(report))


class _Progress(ExitStack):
    """A bar on stderr with the loss and the resident memory; its length is known at the first step."""

    _bar: Any = None

    def update(self, step: "Step") -> None:
        if self._bar is None:
            self._bar = self.enter_context(
                click.progressbar(
                    length=step.total,
                    label="adapting",
                    file=sys.stderr,
                    item_show_func=_shown,
                )
            )
        self._bar.update(step.number - self._bar.pos, step)


def _shown(step: "Step | None") -> str | None:
    return None if step is None else f"loss {step.loss:.4f}  {format_size(step.resident_bytes)}"


def _table(report: dict[str, Any]) -> str:
    memory, seconds, records = report["memory"], report["seconds"], report["records"]
    rows = [
        ["adapter", f"{report['output']} ({report['decision']}, started from {report['started_from']})"],
        [
            "records",
            f"{records['train']} trained on, {records['held_out']} held out, {records['truncated']} cut "
            "short",
        ],
        *(
            [
                "stepped down",
                f"after step {change['step']}, at {format_size(change['peak_bytes'])}: {change['before']} to "
                f"{change['after']}",
            ]
            for change in report["stepped_down"]
        ),
        ["steps", f"{report['steps']} of {seconds['step']:.3f} s, {seconds['total']:.1f} s in all"],
        *(
            []
            if report["exact_gradients"]
            else [["gradients", "estimated by forward passes: expect to need many more steps"]]
        ),
        ["loss", f"{report['losses'][0]:.4f} to {report['losses'][-1]:.4f}"],
        *(
            [
                f"held-out {name}",
                f"{report['held_out_before'][name]:.4f} to {report['held_out_after'][name]:.4f}",
            ]
            for name in ("loss", "accuracy")
            if report["held_out_before"][name] is not None
        ),
        [
            "peak memory",
            f"{format_size(memory['measured_peak_bytes'])} measured, "
            f"{format_size(memory['predicted_peak_bytes'])} predicted ({report['strategy']}), budget "
            f"{format_size(memory['budget_bytes'])}",
        ],
    ]
    return table(rows)
