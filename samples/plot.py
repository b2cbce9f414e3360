"""The demo's picture: resident memory over time, on the device and in PyTorch."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import onnxruntime

from edgepeft.runtime.bench.machine import machine_name, shortened
from edgepeft.sizes import format_size

MIB = 2**20


def memory(report: dict[str, Any], torch: dict[str, Any], path: Path) -> None:
    """Draw the device's memory with its phases, its budget, and PyTorch's memory, to a PNG.

    Args:
        report: of `edgepeft adapt`.
        torch: with the `timeline` of the same training in PyTorch.
        path: of the PNG.
    """
    measured = report["memory"]
    budget = measured["budget_bytes"] / MIB
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for timeline, label, color in (
        (torch["timeline"], "PyTorch + PEFT, float32", "tab:gray"),
        (measured["timeline"], f"edgepeft adapt, {report['strategy']}", "tab:blue"),
    ):
        axes.plot(*zip(*((s, b / MIB) for s, b, *_ in timeline), strict=True), label=label, color=color)
    axes.axhline(budget, color="tab:red", linestyle="--", label=f"budget, {budget:.0f} MiB")
    predicted = measured["predicted_peak_bytes"] / MIB
    axes.axhline(predicted, color="tab:orange", linestyle=":", label=f"predicted peak, {predicted:.0f} MiB")
    end_s = measured["timeline"][-1][0]
    starts = [*measured["phases"], [end_s, ""]]
    for number, ((start_s, phase), (stop_s, _)) in enumerate(pairwise(starts)):
        axes.axvspan(start_s, stop_s, ymax=0.06, color="tab:blue", alpha=0.15 + 0.15 * (number % 2), lw=0)
        if phase == "train":
            axes.text((start_s + stop_s) / 2, 8, phase, ha="center", va="bottom", fontsize=9)
        else:
            side = "right" if start_s > end_s / 2 else "left"
            axes.annotate(
                phase,
                ((start_s + stop_s) / 2, 25),
                xytext=(0, 14 + 16 * (number % 2)),
                textcoords="offset points",
                ha=side,
                fontsize=9,
                arrowprops={"arrowstyle": "-", "lw": 0.6},
            )
    axes.set_title(title(report), fontsize="medium", parse_math=False)
    axes.set(
        xlabel="seconds",
        ylabel="MiB",
        ylim=(0, None),
        xlim=(0, None),
    )
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def title(report: dict[str, Any]) -> str:
    """Two lines: the model and its budget; the machine and what ran on it."""
    return (
        f"{shortened(report['model'])} learns in {format_size(report['memory']['budget_bytes'])}: resident "
        f"memory of the whole process\n{machine_name()}, onnxruntime {onnxruntime.__version__}"
    )
