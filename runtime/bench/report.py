"""What a benchmark measured, phase by phase."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from ..memory.process import Sample

Status = Literal["ran", "refused", "killed"]


@dataclass(frozen=True)
class Measured:
    """What one phase took in a process of its own.

    Attributes:
        seconds: median of one run: of loading, of a prompt, of a token, of a batch, of a training step, of
            the first answer with another adapter. None where it was too short to tell.
        runs: runs that the median is of.
        tokens_per_s: tokens (of a language model), or samples or rows, that the phase gets through.
        predicted_peak_bytes: the planner's figure for the whole process.
        peak_bytes: the kernel's peak of the process's resident memory.
        anonymous_bytes, file_bytes: largest samples of its parts (None where the system does not tell them
            apart); their largest moments need not be the same.
        strategy: how the training step computed gradients; None for the other phases.
        timeline: seconds since the phase began, and resident, anonymous and file-backed bytes then.
    """

    seconds: float | None
    runs: int
    tokens_per_s: float | None
    predicted_peak_bytes: int
    peak_bytes: int
    anonymous_bytes: int | None
    file_bytes: int | None
    strategy: str | None
    timeline: list[Sample]


@dataclass(frozen=True)
class PhaseResult:
    """A phase and what became of it.

    Attributes:
        name: `load`, `prefill`, `decode`, `predict`, `train` or `swap`.
        status: `ran`; `refused`, because the planner found the budget too small; or `killed` by the kernel.
        message: why it did not run; None where it did.
        required_bytes: the smallest budget that the planner would accept, where it refused.
        cgroup_peak_bytes: the most that the memory cgroup held, page cache included; None without one.
        measured: the figures, where it ran.
    """

    name: str
    status: Status
    message: str | None = None
    required_bytes: int | None = None
    cgroup_peak_bytes: int | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class BenchReport:
    """A benchmark of one bundle.

    Attributes:
        edgepeft_version, onnxruntime_version, machine: what it was measured with and on.
        model: the base model's name.
        bundle: the bundle's folder.
        task: its task.
        budget_bytes: the memory budget; None for none.
        enforced_by: `memory cgroup`, or `edgepeft` where the budget is only planned for and watched.
        note: what the figures do not say, such as why there is no cgroup; None if nothing.
        seq_len, batch_size, steps: the sizes.
        phases: in the order in which they ran.
    """

    edgepeft_version: str
    onnxruntime_version: str
    machine: str
    model: str
    bundle: str
    task: str
    budget_bytes: int | None
    enforced_by: str | None
    note: str | None
    seq_len: int
    batch_size: int
    steps: int
    phases: list[PhaseResult]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)
