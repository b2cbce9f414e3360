"""What is told about an update, kept or not."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepeft.errors import UsageError

from ..memory.process import Sample

REPORT_FILE = "adapt_report.json"


@dataclass(frozen=True)
class MemoryReport:
    """Resident memory of the whole process, predicted and measured, in bytes.

    Attributes:
        budget_bytes: the budget, None if there was none.
        predicted_peak_bytes: the figure of the plan that the update ended with, of which `predicted` gives
            the parts; those of the plans before it are in `AdaptReport.stepped_down`.
        measured_peak_bytes: the system's figure for the update; where `peak_is_exact` is false, the largest
            sample.
        last_peak_bytes: the same since training began with the last plan.
        timeline: seconds since the update began, and resident, anonymous and file-backed bytes then.
        phases: `[seconds since the update began, what began then]`.
    """

    budget_bytes: int | None
    predicted_peak_bytes: int
    predicted: dict[str, int]
    measured_peak_bytes: int
    last_peak_bytes: int
    peak_is_exact: bool
    timeline: list[Sample]
    phases: list[tuple[float, str]]


@dataclass(frozen=True)
class StepDown:
    """A change to a cheaper plan after a step: the peak in bytes that led to it, what the plan before had
    predicted, and both plans' names."""

    step: int
    peak_bytes: int
    predicted_peak_bytes: int
    before: str
    after: str


@dataclass(frozen=True)
class HeldOut:
    """Mean loss and accuracy (None where the task has none) on the held-out records."""

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Candidate:
    """What could have become the adapter: `compared` is the loss where classes count alike."""

    name: str
    loss: float
    accuracy: float | None
    compared: float


@dataclass(frozen=True)
class DropoutReport:
    """What the adapter's configuration wants dropped in training, and where it was.

    Attributes:
        asked: the shares by option of PEFT's, such as `lora_dropout`; those that are not 0.
        modules: modules that the adapter is on.
        applied: of them those that the training graph can drop something at.
        rate: the share that is dropped there.
    """

    asked: dict[str, float]
    modules: int
    applied: int
    rate: float


@dataclass(frozen=True)
class AdaptReport:
    """An update: what was done, what it cost and how it was judged.

    Attributes:
        edgepeft_version: that made the update.
        task: the bundle's task.
        model: the base model's name.
        started_from: the adapter that training started from.
        output: the folder that holds the new adapter if `decision` is `kept`.
        decision: `kept` or `rejected`.
        strategy: how it was trained, at the end.
        stepped_down: changes of it on the way, because the process came near its budget.
        exact_gradients: whether gradients were computed, or estimated from losses along random directions.
        options: the training options.
        dropout: see `DropoutReport`.
        trained_tensors, trained_values: what trained.
        records: counts of `train`, `held_out`, `truncated` and `left_out` records, the last having nothing to
            learn, and of those of other labels that are `remembered` by their features.
        first_left_out: what is said of the first record that was left out; None if there is none.
        steps: optimizer steps; `resumed_from_step` of them were done by an earlier process.
        losses, learning_rates, grad_norms: one entry a step, the norm before clipping (of an
            estimate, its slope).
        limited_steps: steps after which the policy's `max_relative_change` scaled the update back.
        relative_change: L2 norm of the update divided by that of what it started from.
        judged_by: `held-out records`, or `leave-one-out`: each record by a head that was fitted without it.
        chosen: what became the adapter: `trained`, or `closed-form head`.
        candidates: loss and accuracy of each on the judged records, with what they are compared by.
        held_out_before, held_out_after: the judgement.
        trivial: the best that says the same of every record, where the task is a classifier's.
        accuracy_interval: 95 % of `held_out_after`'s accuracy, from the number of judged records.
        by_label: of each label the judged `items` and how many are `right`.
        seconds: `total`, `train`, `evaluate` and the median `step` of this process.
        memory: see `MemoryReport`.
    """

    edgepeft_version: str
    task: str
    model: str
    started_from: str
    output: str
    decision: str
    strategy: str
    stepped_down: list[StepDown]
    exact_gradients: bool
    options: dict[str, Any]
    dropout: DropoutReport
    trained_tensors: int
    trained_values: int
    records: dict[str, int]
    first_left_out: str | None
    steps: int
    resumed_from_step: int
    losses: list[float]
    learning_rates: list[float]
    grad_norms: list[float]
    limited_steps: int
    relative_change: float
    judged_by: str
    chosen: str
    candidates: list[Candidate]
    held_out_before: HeldOut
    held_out_after: HeldOut
    trivial: HeldOut | None
    accuracy_interval: tuple[float, float] | None
    by_label: dict[str, dict[str, int]]
    seconds: dict[str, float]
    memory: MemoryReport = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


def read_report(path: Path) -> AdaptReport:
    """The report that an update has left in its adapter's folder.

    Raises:
        UsageError: it is damaged.
    """
    try:
        told = json.loads(path.read_bytes())
        memory = told["memory"] | {
            "timeline": [tuple(sample) for sample in told["memory"]["timeline"]],
            "phases": [tuple(phase) for phase in told["memory"]["phases"]],
        }
        interval = told["accuracy_interval"]
        return AdaptReport(
            **told
            | {
                "dropout": DropoutReport(**told["dropout"]),
                "stepped_down": [StepDown(**item) for item in told["stepped_down"]],
                "candidates": [Candidate(**item) for item in told["candidates"]],
                "held_out_before": HeldOut(**told["held_out_before"]),
                "held_out_after": HeldOut(**told["held_out_after"]),
                "trivial": None if told["trivial"] is None else HeldOut(**told["trivial"]),
                "accuracy_interval": None if interval is None else tuple(interval),
                "memory": MemoryReport(**memory),
            }
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is no report of an update ({error}): start over without --resume"
        ) from error
