"""`edgepeft bench`: what a bundle takes on this device, phase by phase."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from ..sizes import format_size
from .console import Console
from .options import budget_option, bundle_argument, json_option, table

if TYPE_CHECKING:
    from edgepeft.runtime.bench.report import BenchReport, PhaseResult


@click.command(short_help="Measure time and memory beside their prediction.")
@bundle_argument()
@budget_option()
@click.option(
    "--seq-len", type=int, help="Tokens of a prompt or record (128 unless given), or samples (160,000)."
)
@click.option("--batch-size", type=int, default=1, show_default=True, help="Records of a batch.")
@click.option("--steps", type=int, default=5, show_default=True, help="Counted runs of every phase.")
@click.option(
    "--max-new-tokens", type=int, default=16, show_default=True, help="Tokens to write after a prompt."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the memory over time."
)
@json_option()
@click.pass_obj
def bench(
    console: Console,
    /,
    bundle: str,
    budget: int | None,
    seq_len: int | None,
    batch_size: int,
    steps: int,
    max_new_tokens: int,
    plot: Path | None,
) -> None:
    """Measure BUNDLE on this device: loading, prefill and decode (or predict, where a model does not
    generate), a training step, and swapping adapters; on random records.

    Every phase is a process of its own. With a budget it runs inside a memory cgroup of that size, where the
    system allows one, and may be refused (by the plan) or killed (by the kernel): its row says so. Exit 3:
    not one phase runs in the budget.

    \b
    Example:
      edgepeft bench model.edge --budget 256MiB --plot memory.png
    """
    from edgepeft.runtime.bench.plot import draw, require_matplotlib
    from edgepeft.runtime.bench.run import BenchOptions
    from edgepeft.runtime.bench.run import bench as measure

    if plot is not None:
        require_matplotlib()
        if not plot.parent.is_dir():
            raise UsageError(f"--plot {plot}: there is no folder {plot.parent}: make it first")
    options = BenchOptions(seq_len, batch_size, steps, max_new_tokens)

    def began(phase: str) -> None:
        console.progress.stage(f"measuring {phase}", at_once=True)

    report = measure(bundle, options, budget, began)
    if plot is not None:
        draw(report, plot)
    console.show(report.to_dict(), lambda _: _table(report))


def _table(report: "BenchReport") -> str:
    header = ["phase", "seconds", "tokens/s", "predicted", "peak", "anonymous", "file", "in the cgroup", ""]
    lines = [table([_row(phase) for phase in report.phases], header)]
    sizes = f"{report.batch_size} x {report.seq_len}, median of {report.steps}"
    if report.budget_bytes is None:
        lines.append(f"{sizes}; no budget")
    else:
        lines.append(f"{sizes}; budget {format_size(report.budget_bytes)}, enforced by {report.enforced_by}")
    lines += [f"{phase.name}: {phase.message}" for phase in report.phases if phase.message is not None]
    if report.note is not None:
        lines.append(report.note)
    return "\n".join(lines)


def _row(phase: "PhaseResult") -> list[str]:
    measured = phase.measured
    in_cgroup = _size(phase.cgroup_peak_bytes)
    if measured is None:
        return [phase.name, *["-"] * 6, in_cgroup, phase.status]
    return [
        phase.name,
        "-" if measured.seconds is None else f"{measured.seconds:.4f}",
        "-" if measured.tokens_per_s is None else f"{measured.tokens_per_s:.0f}",
        _size(measured.predicted_peak_bytes),
        _size(measured.peak_bytes),
        _size(measured.anonymous_bytes),
        _size(measured.file_bytes),
        in_cgroup,
        measured.strategy or "",
    ]


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)
