"""A benchmark: every phase in a fresh process, in a memory cgroup of the budget's size where there is one."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

import edgepeft
from edgepeft.adapters import save_adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import BudgetError, CgroupError, EdgePeftError, UsageError
from edgepeft.sizes import format_size
from edgepeft.techniques import peft_slots

from ..memory.cgroup import MemoryCgroup, drop_page_cache
from ..memory.process import Sample
from ..training.options import TrainingOptions
from .machine import machine_name
from .phases import Request, names
from .report import BenchReport, Measured, PhaseResult
from .synthetic import synthetic_adapter

_WARM_CACHE = "file pages that were in memory before are not charged to the cgroup: dropping them needs root"


@dataclass(frozen=True)
class BenchOptions:
    """The sizes to measure with.

    Attributes:
        seq_len: tokens of a prompt or a record, or samples; None is 128 tokens or 160,000 samples, or the
            model's maximum if that is less.
        batch_size: records of a batch.
        steps: counted runs of every phase.
        max_new_tokens: tokens to write after a prompt.
    """

    seq_len: int | None = None
    batch_size: int = 1
    steps: int = 5
    max_new_tokens: int = 16

    def check(self, manifest: Manifest) -> None:
        """Raise where a size is out of range for this bundle.

        Raises:
            UsageError: names the option, its value and what is allowed.
        """
        TrainingOptions(seq_len=self.seq_len, batch_size=self.batch_size, steps=self.steps).check(manifest)
        limit = manifest.model.max_length
        if not 1 <= self.max_new_tokens < limit and manifest.task.endswith("-generation"):
            raise UsageError(
                f"max_new_tokens is {self.max_new_tokens}, expected 1 to {limit - 1}: the model's context "
                f"holds {limit} and a prompt has at least one"
            )


def bench(
    path: str | Path,
    options: BenchOptions,
    budget_bytes: int | None,
    report: Callable[[str], None],
) -> BenchReport:
    """Measure every phase that a bundle has.

    Args:
        path: the bundle's folder.
        options: the sizes.
        budget_bytes: limit on the memory of each phase's process, which the kernel enforces where the system
            gives a memory cgroup; None for no limit.
        report: called with a phase's name when it begins.

    Raises:
        BudgetError: no phase could run in the budget; where one could, the others' results say why not.
        EdgePeftError: a phase failed for another reason.
    """
    bundle = open_bundle(path)
    options.check(bundle.manifest)
    note = None if budget_bytes is None else _cgroup_note(budget_bytes)
    enforced = budget_bytes is not None and note in (None, _WARM_CACHE)
    with _scratch(bundle) as scratch:
        adapters = _write_adapters(bundle, Path(scratch))
        phases = []
        for name in names(bundle.manifest):
            report(name)
            request = _request(bundle, name, scratch, adapters, options, budget_bytes)
            phases.append(_run(request, budget_bytes if enforced else None))
    if all(phase.status != "ran" for phase in phases):
        assert budget_bytes is not None
        # A killed phase has no figure: it needs more than the budget, which its plan had found enough.
        least = min(phases, key=lambda phase: phase.required_bytes or budget_bytes)
        raise BudgetError(
            f"no phase runs in {format_size(budget_bytes)}; the smallest, {least.name}: {least.message}",
            budget_bytes=budget_bytes,
            required_bytes=least.required_bytes or budget_bytes,
        )
    return BenchReport(
        edgepeft_version=edgepeft.__version__,
        onnxruntime_version=ort.__version__,
        machine=machine_name(),
        model=bundle.manifest.model.name,
        bundle=str(path),
        task=bundle.manifest.task,
        budget_bytes=budget_bytes,
        enforced_by=None if budget_bytes is None else "memory cgroup" if enforced else "edgepeft",
        note=note,
        seq_len=TrainingOptions(seq_len=options.seq_len).tokens(bundle.manifest),
        batch_size=options.batch_size,
        steps=options.steps,
        phases=phases,
    )


def _request(
    bundle: Bundle,
    phase: str,
    scratch: str,
    adapters: tuple[str, ...],
    options: BenchOptions,
    budget_bytes: int | None,
) -> Request:
    manifest = bundle.manifest
    seq_len: int | None = TrainingOptions(seq_len=options.seq_len).tokens(manifest)
    if manifest.task == "image-classification":
        seq_len = None
    elif phase == "decode" and seq_len is not None:  # what is written must fit the context, too
        seq_len = min(seq_len, manifest.model.max_length - options.max_new_tokens - 1) or 1
    elif phase == "prefill" and seq_len is not None:
        seq_len = min(seq_len, manifest.model.max_length - 1)
    return Request(
        bundle=str(bundle.path),
        phase=phase,
        scratch=scratch,
        adapters=adapters,
        budget_bytes=budget_bytes,
        seq_len=seq_len,
        batch_size=options.batch_size,
        steps=options.steps,
        new_tokens=options.max_new_tokens,
    )


def _run(request: Request, limit_bytes: int | None) -> PhaseResult:
    """A phase in a process of its own, in a memory cgroup where there is a limit."""
    command = [sys.executable, "-m", "edgepeft.runtime.bench.worker", json.dumps(dataclasses.asdict(request))]
    group: MemoryCgroup | None = None
    with ExitStack() as stack:
        if limit_bytes is not None:
            group = stack.enter_context(MemoryCgroup(limit_bytes))
            command = group.command(command)
            drop_page_cache()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        peak_bytes = group.peak_bytes if group else None
        kills = group.oom_kills if group else 0
    if limit_bytes is not None and kills:
        message = f"the kernel killed it: it needs more than {format_size(limit_bytes)}"
        return PhaseResult(request.phase, "killed", message, None, peak_bytes)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise EdgePeftError(
            f"{request.bundle}: phase {request.phase}: its process ended with exit code {done.returncode}: "
            f"{lines[-1] if lines else 'it said nothing'}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "failed" in answer:
        raise EdgePeftError(f"phase {request.phase}: {answer['failed']}")
    if "refused" in answer:
        return PhaseResult(request.phase, "refused", answer["refused"], answer["required_bytes"], peak_bytes)
    fields = answer["measured"]
    measured = Measured(**{**fields, "timeline": [Sample(*sample) for sample in fields["timeline"]]})
    return PhaseResult(request.phase, "ran", None, None, peak_bytes, measured)


def _cgroup_note(budget_bytes: int) -> str | None:
    """Why the kernel does not enforce the budget, or not on every page; None where it does."""
    try:
        with MemoryCgroup(budget_bytes):
            return None if drop_page_cache() else _WARM_CACHE
    except CgroupError as error:
        return f"the budget is not enforced by the kernel: {error}"


def _scratch(bundle: Bundle) -> "tempfile.TemporaryDirectory[str]":
    """A folder on the bundle's disk: the system's temporary folder may be memory, which a cgroup counts."""
    try:
        return tempfile.TemporaryDirectory(prefix=".bench-", dir=bundle.path.absolute().parent)
    except OSError:
        return tempfile.TemporaryDirectory(prefix=".bench-")


def _write_adapters(bundle: Bundle, scratch: Path) -> tuple[str, ...]:
    """Two adapters to run, to train and to swap."""
    if not peft_slots(bundle.manifest.slots):
        return ()
    folders = []
    for seed in (0, 1):
        folder = scratch / f"adapter-{seed}"
        save_adapter(synthetic_adapter(bundle, seed), folder)
        folders.append(str(folder))
    return tuple(folders)
