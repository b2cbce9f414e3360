"""The timeline of a benchmark as a picture (the `plot` extra)."""

from pathlib import Path

from edgepeft.errors import MissingExtraError
from edgepeft.files import atomic_file
from edgepeft.sizes import format_size

from .machine import shortened
from .report import BenchReport

_MIB = 2**20


def require_matplotlib() -> None:
    """Raise before anything is measured, rather than after, where nothing can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing the timeline") from error
    matplotlib.use("Agg")


def draw(report: BenchReport, path: Path) -> None:
    """Write a PNG of the memory over time: phases one after the other, each a process of its own.

    Anonymous and file-backed pages are stacked, the whole resident memory is a line, and so is the budget.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    start_s, ticks = 0.0, []
    for phase in report.phases:
        if phase.measured is None:
            continue
        samples = phase.measured.timeline
        seconds = [start_s + sample.seconds for sample in samples]
        first = start_s == 0
        axes.stackplot(
            seconds,
            [(sample.anonymous_bytes or 0) / _MIB for sample in samples],
            [(sample.file_bytes or 0) / _MIB for sample in samples],
            labels=["anonymous", "file-backed"] if first else (),
            colors=["tab:blue", "tab:cyan"],
            alpha=0.6,
        )
        axes.plot(
            seconds,
            [sample.resident_bytes / _MIB for sample in samples],
            color="black",
            lw=0.8,
            label="resident" if first else "",
        )
        axes.hlines(
            phase.measured.predicted_peak_bytes / _MIB,
            seconds[0],
            seconds[-1],
            color="tab:orange",
            linestyle=":",
            label="predicted peak" if first else "",
        )
        ticks.append((sum((seconds[0], seconds[-1])) / 2, phase.name))
        start_s = seconds[-1]
        axes.axvline(start_s, color="tab:gray", lw=0.6)
    if report.budget_bytes is not None:
        axes.axhline(report.budget_bytes / _MIB, color="tab:red", linestyle="--", label="budget")
    names = axes.secondary_xaxis("top")
    names.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set(xlabel="seconds, one process after the other", ylabel="MiB", xlim=(0, start_s), ylim=(0, None))
    figure.suptitle(title(report), fontsize="medium", parse_math=False)
    figure.legend(loc="outside right center")
    try:
        with atomic_file(path) as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        plt.close(figure)


def title(report: BenchReport) -> str:
    """Two lines: the model and its budget; the machine and what ran on it."""
    budget = "no budget" if report.budget_bytes is None else f"budget {format_size(report.budget_bytes)}"
    return (
        f"{shortened(report.model)}: memory of every phase, {budget}\n"
        f"{report.machine}, onnxruntime {report.onnxruntime_version}"
    )
