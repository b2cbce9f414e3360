"""`edgepeft adapt`: train an adapter on this device's records, inside a memory budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ..errors import UpdateRejectedError
from ..sizes import format_size
from .console import Console
from .interrupts import Interrupted
from .options import (
    budget_option,
    bundle_argument,
    check_floor,
    data_option,
    force_option,
    fresh_options,
    json_option,
    memory_options,
    table,
)

if TYPE_CHECKING:
    from edgepeft.runtime.training.trainer import Step


@click.command(short_help="Train an adapter within a budget.")
@bundle_argument()
@data_option("JSON lines to learn from; - reads them from standard input.")
@budget_option(required=True)
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder for the new PEFT adapter.")
@click.option("--adapter", help="Adapter to start from, by name or path; the bundle's first unless given.")
@force_option()
@fresh_options()
@click.option(
    "--add-label",
    "add_labels",
    multiple=True,
    metavar="NAME",
    help="A class that the classifier does not have yet; may be repeated. Give records of the others too, "
    "unless the adapter was taught them here: then it keeps what it needs.",
)
@memory_options()
@click.option("--steps", type=int, help="Optimizer steps; --epochs decides unless given.")
@click.option("--epochs", type=int, help="Passes over the records; their number decides unless given.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Records computed at once.")
@click.option("--seq-len", type=int, help="Tokens a text is cut to (128 unless given), or samples (160,000).")
@click.option("--lr", "learning_rate", type=float, help="Peak learning rate; the task decides unless given.")
@click.option(
    "--lora-plus",
    "lora_plus_ratio",
    type=float,
    metavar="RATIO",
    help="How many times that rate a LoRA's B learns at, such as 16 (LoRA+).",
)
@click.option(
    "--warmup-steps",
    type=int,
    help="Steps of rising learning rate; a tenth of all, at most 100, unless given.",
)
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
@click.pass_obj
def adapt(
    console: Console, /, bundle: str, data: str, budget: int, output: str, force: bool, **options: Any
) -> None:
    """Train an adapter of BUNDLE on the records of a file, and keep it if it is better on held-out ones.

    The result is a PEFT adapter folder. Exit 3: the budget cannot be met. Exit 4: the new adapter is worse,
    and nothing was written. Ctrl-C finishes the step, saves the work beside the output and prints the command
    that goes on with it (exit 130, and 143 after SIGTERM); a second one ends at once.

    \b
    Example:
      edgepeft adapt model.edge --data records.jsonl --budget 256MiB -o my-adapter --steps 100
      edgepeft adapt model.edge --data records.jsonl --budget 256MiB -o my-adapter --steps 100 --resume
    """
    check_floor(budget)
    with _Steps(console, data, resume=options["resume"]) as steps:
        console.progress.stage("opening the bundle")
        from edgepeft.runtime import load
        from edgepeft.runtime.training.state.checkpoint import checkpoint_path

        steps.saved_in(checkpoint_path(Path(output)))
        with load(bundle, memory_budget=budget, force=force) as model:
            console.progress.stage("reading the records and judging the adapter as it is")
            try:
                report = model.adapt(data, output, on_step=steps.done, **options).to_dict()
            except UpdateRejectedError as error:
                if error.report is not None:
                    _note_left_out(console, error.report)
                    if console.as_json:
                        console.show(error.report, _table)
                raise
    _note_left_out(console, report)
    _note_dropout(console, report)
    console.show(report, _table)


class _Steps:
    """Follows an update step by step. While one trains, an interrupt waits for its end; of one that ends the
    update, it says how to go on."""

    def __init__(self, console: Console, data: str, *, resume: bool) -> None:
        self._console = console
        self._from_stdin = data == "-"
        self._checkpoint: Path | None = None
        self._resume = resume
        self._last: Step | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._console.interrupts.raised is not None:
            self._tell(self._console.interrupts.raised)

    def saved_in(self, checkpoint: Path) -> None:
        """Where the work is saved; notes if there is some that is not asked for."""
        self._checkpoint = checkpoint
        if checkpoint.exists() and not self._resume:
            self._console.note(
                f"note: {checkpoint} is of an update that was not finished: --resume would go on with it, "
                "this one starts over"
            )
        elif self._resume and not checkpoint.exists():
            self._console.note(
                f"note: {checkpoint} is not there: there is nothing to resume, so this one begins"
            )

    def done(self, step: "Step") -> None:
        """A step is done.

        Raises:
            Interrupted: and the update ends here.
        """
        progress, interrupts = self._console.progress, self._console.interrupts
        first, self._last = self._last is None, step
        if step.number < step.total:
            interrupts.hold(f"finishing step {step.number + 1} and saving")
        else:
            interrupts.release()
        if first:
            progress.stage("adapting")
        note = f"loss {step.loss:.4f}, {format_size(step.resident_bytes)}"
        progress.update(step.number, step.total, "steps", note, at_once=True)
        if step.number == step.total:
            progress.stage("judging the new adapter")

    def _tell(self, interrupted: Interrupted) -> None:
        if self._last is not None:
            how_far = f"after step {self._last.number} of {self._last.total}"
            interrupted.message += f" {how_far}; the work so far is in {self._checkpoint}"
        elif self._resume:
            interrupted.message += " before another step; the checkpoint is as it was"
        else:
            interrupted.message += " before the first step; there is nothing to save"
        if self._from_stdin:
            interrupted.message += "; standard input has to bring the same records again"
        interrupted.go_on = self._console.command_line(*(["--resume"] if self._last else []))


def _note_left_out(console: Console, report: dict[str, Any]) -> None:
    count = report["records"]["left_out"]
    if count:
        console.progress.close()
        first = report["first_left_out"]
        console.note(f"note: records with nothing to learn are left out ({count}), first {first}")


def _note_dropout(console: Console, report: dict[str, Any]) -> None:
    asked, applied, modules = (report["dropout"][name] for name in ("asked", "applied", "modules"))
    if asked and applied < modules and report["steps"]:
        said = ", ".join(f"{name} {share:g}" for name, share in asked.items())
        console.note(
            f"note: the adapter's configuration has {said}, which is applied on {applied} of its {modules} "
            "modules: see docs/adapters.md"
        )


def _table(report: dict[str, Any]) -> str:
    memory, seconds, records = report["memory"], report["seconds"], report["records"]
    since = f" ({format_size(memory['last_peak_bytes'])} since)" if report["stepped_down"] else ""
    rows = [
        ["adapter", f"{report['output']} ({report['decision']}, started from {report['started_from']})"],
        [
            "records",
            f"{records['train']} trained on, {records['held_out']} held out, {records['truncated']} cut "
            f"short, {records['left_out']} left out"
            + (f", {records['remembered']} of other labels remembered" if records["remembered"] else ""),
        ],
        *(
            [
                "stepped down",
                f"after step {change['step']}, at {format_size(change['peak_bytes'])} "
                f"({format_size(change['predicted_peak_bytes'])} predicted): {change['before']} to "
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
        *([["loss", f"{report['losses'][0]:.4f} to {report['losses'][-1]:.4f}"]] if report["losses"] else []),
        ["judged", _judged(report)],
        *(
            [
                f"{report['judged_by']}: {name}",
                f"{report['held_out_before'][name]:.4f} to {report['held_out_after'][name]:.4f}",
            ]
            for name in ("loss", "accuracy")
            if report["held_out_before"][name] is not None
        ),
        [
            "peak memory",
            f"{format_size(memory['measured_peak_bytes'])} measured{since}, "
            f"{format_size(memory['predicted_peak_bytes'])} predicted ({report['strategy']}), budget "
            f"{format_size(memory['budget_bytes'])}",
        ],
    ]
    return table(rows)


def _judged(report: dict[str, Any]) -> str:
    """What was chosen, and how sure its accuracy is."""
    text = f"{report['chosen']} of {', '.join(item['name'] for item in report['candidates'])}"
    if report["accuracy_interval"] is not None:
        low, high = report["accuracy_interval"]
        text += f"; accuracy {low:.2f} to {high:.2f} with 95 % confidence"
    if report["trivial"] is not None and report["trivial"]["accuracy"] is not None:
        text += f", {report['trivial']['accuracy']:.2f} by always saying the same"
    return text
