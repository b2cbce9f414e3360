"""One update from beginning to end: plan, judge, train, judge again, keep or reject."""

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from edgepeft.runtime.activation import graph_inputs, to_peft_layout
from edgepeft.runtime.data import RecordSource, records
from edgepeft.runtime.memory.planner import Plan, Workload, choose, plans
from edgepeft.runtime.memory.process import MemoryRecorder, read_memory, release_freed_memory
from edgepeft.runtime.tasks import Example, Task
from edgepeft.runtime.training.buffers import TrainingState
from edgepeft.runtime.training.checkpoint import Progress, checkpoint_path, load_checkpoint, save_checkpoint
from edgepeft.runtime.training.gate import Evaluation, evaluate
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.report import REPORT_FILE, AdaptReport, HeldOut, MemoryReport
from edgepeft.runtime.training.sampling import split, steps_per_epoch
from edgepeft.runtime.training.starting import starting_adapter, trained_names
from edgepeft.runtime.training.trainer import Schedule, Step, train

import edgepeft
from edgepeft.adapters import CONFIG_FILE, Adapter, write_adapter
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.writer import MANIFEST_FILE, hash_file
from edgepeft.errors import BudgetError, UpdateRejectedError, UsageError
from edgepeft.files import atomic_folder, atomic_write, check_replaceable
from edgepeft.sizes import format_size

CHECKPOINT_STEPS = 10
"""Steps between two checkpoints."""

OnStep = Callable[[Step], None]


@dataclass
class _Clock:
    """Seconds spent in the two phases."""

    train_s: float = 0.0
    evaluate_s: float = 0.0
    step_s: list[float] = dataclasses.field(default_factory=list)


class Update:
    """One update of an adapter on this device.

    Args:
        bundle: the bundle.
        task: its task.
        source: the records.
        output: folder for the new adapter; left alone unless the update is kept.
        options: training options.
        budget_bytes: limit on the whole process's resident memory; None for no limit.
        threads: threads of the sessions; 0 lets onnxruntime choose.
        on_step: called after every step.

    Raises:
        UsageError: an option or the output cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        task: Task,
        source: RecordSource,
        output: Path,
        options: TrainingOptions,
        budget_bytes: int | None = None,
        threads: int = 0,
        on_step: OnStep | None = None,
    ) -> None:
        options.check(bundle.manifest)
        if options.batch_size < task.minimum_batch:
            raise UsageError(
                f"batch_size is {options.batch_size}, {bundle.manifest.task} learns from at least "
                f"{task.minimum_batch} records at once"
            )
        self._bundle = bundle
        self._task = task
        self._source = source
        self._output = output.absolute()
        self._options = options
        self._budget_bytes = budget_bytes
        self._threads = threads
        self._on_step = on_step
        self._checkpoint = checkpoint_path(self._output)
        self._clock = _Clock()
        _check_output(bundle, self._output)

    def run(self) -> AdaptReport:
        """Do it.

        Raises:
            BudgetError: the budget cannot be met, before the first step or, with a checkpoint kept, after
            one.
            UpdateRejectedError: the new adapter is worse on the held-out records; nothing is written.
            DataError: a record cannot be used, or there are too few.
            AdapterError: the starting adapter is damaged or does not fit.
        """
        with MemoryRecorder() as recorder:
            start_s = time.perf_counter()
            report = self._run(recorder)
            report = dataclasses.replace(
                report, seconds={"total": time.perf_counter() - start_s, **report.seconds}
            )
        if report.decision != "kept":
            self._checkpoint.unlink(missing_ok=True)
            before, after = report.held_out_before.loss, report.held_out_after.loss
            raise UpdateRejectedError(
                f"the update is rejected: held-out loss went from {before:.4f} to {after:.4f} on "
                f"{report.records['held_out']} records, so {self._output} is left as it was: use more data "
                f"or steps, or a "
                "lower learning rate",
                report.to_dict(),
            )
        return report

    def _run(self, recorder: MemoryRecorder) -> AdaptReport:
        bundle, options, task = self._bundle, self._options, self._task
        recorder.mark("read records")
        adapter = starting_adapter(bundle, options)
        names = trained_names(bundle.manifest, adapter, options.trainable)
        examples = task.encode_all(records(self._source), options.tokens(bundle.manifest), training=True)
        task.release()
        train_on, held_out = split(len(examples), options.eval_fraction, options.seed, task.minimum_batch)
        total_steps = self._total_steps(len(train_on))
        release_freed_memory()
        rows = min(options.batch_size, len(examples)) * task.rows_per_record
        sizes = workload(adapter, names, rows, max(example.length for example in examples))
        plan = choose(
            plans(bundle.manifest, sizes, read_memory().resident_bytes),
            self._budget_bytes,
        )
        inputs = graph_inputs(bundle, [(adapter, 1.0)])
        state = TrainingState({name: inputs[name] for name in names})
        fingerprint = self._fingerprint(adapter, examples, total_steps)
        progress = (
            load_checkpoint(self._checkpoint, fingerprint, state) if options.resume else None
        ) or Progress()
        resumed_from_step = progress.step
        judged = [examples[index] for index in held_out]

        def judge() -> Evaluation:
            recorder.mark("evaluate")
            began_s = time.perf_counter()
            result = evaluate(
                bundle, task, {**inputs, **state.parameters}, judged, options.batch_size, self._threads
            )
            release_freed_memory()
            self._clock.evaluate_s += time.perf_counter() - began_s
            return result

        if progress.held_out_before is None:
            first = judge()
            progress.held_out_before = (first.loss, first.accuracy)
        before = Evaluation(*progress.held_out_before)
        recorder.mark("train")
        self._train(
            plan,
            [examples[index] for index in train_on],
            inputs,
            state,
            progress,
            fingerprint,
            recorder,
            total_steps,
        )
        after = judge()
        kept = after.is_no_worse_than(before)
        report = AdaptReport(
            edgepeft_version=edgepeft.__version__,
            task=bundle.manifest.task,
            model=bundle.manifest.model.name,
            started_from=adapter.origin,
            output=str(self._output),
            decision="kept" if kept else "rejected",
            strategy=plan.strategy,
            options=dataclasses.asdict(options),
            trained_tensors=len(names),
            trained_values=state.count,
            records={
                "train": len(train_on),
                "held_out": len(held_out),
                "truncated": sum(example.truncated for example in examples),
            },
            steps=progress.step,
            resumed_from_step=resumed_from_step,
            losses=progress.losses,
            learning_rates=progress.learning_rates,
            grad_norms=progress.grad_norms,
            limited_steps=progress.limited_steps,
            relative_change=state.relative_change(),
            held_out_before=HeldOut(before.loss, before.accuracy),
            held_out_after=HeldOut(after.loss, after.accuracy),
            seconds={
                "train": self._clock.train_s,
                "evaluate": self._clock.evaluate_s,
                "step": statistics.median(self._clock.step_s) if self._clock.step_s else 0.0,
            },
            memory=_memory_report(self._budget_bytes, plan, recorder),
        )
        if kept:
            self._keep(adapter, to_peft_layout(bundle, state.parameters), report)
        return report

    def _total_steps(self, count: int) -> int:
        options = self._options
        total = options.steps or options.epochs * steps_per_epoch(
            count, options.batch_size, self._task.minimum_batch
        )
        limit = self._bundle.manifest.policy.max_steps
        if limit is not None and total > limit:
            raise UsageError(
                f"{options.epochs} epochs of {count} records are {total} steps, the bundle's policy allows "
                f"{limit} an "
                f"update: give --steps {limit}"
            )
        return total

    def _train(
        self,
        plan: Plan,
        examples: list[Example],
        inputs: dict[str, npt.NDArray[np.float32]],
        state: TrainingState,
        progress: Progress,
        fingerprint: dict[str, Any],
        recorder: MemoryRecorder,
        total_steps: int,
    ) -> None:
        manifest = self._bundle.manifest
        role = next(strategy.graph for strategy in manifest.strategies if strategy.name == plan.strategy)
        began_s = last_s = time.perf_counter()

        def after_step(loss: float) -> None:
            nonlocal last_s
            now_s = time.perf_counter()
            self._clock.step_s.append(now_s - last_s)
            if progress.step % CHECKPOINT_STEPS == 0 or progress.step == total_steps:
                save_checkpoint(self._checkpoint, fingerprint, state, progress)
            self._enforce(
                plan,
                recorder,
                lambda: save_checkpoint(self._checkpoint, fingerprint, state, progress),
                progress.step,
            )
            if self._on_step is not None:
                self._on_step(Step(progress.step, total_steps, loss, read_memory().resident_bytes))
            last_s = time.perf_counter()

        self._output.parent.mkdir(parents=True, exist_ok=True)
        schedule = Schedule(self._options, total_steps, manifest.policy.max_relative_change)
        try:
            train(
                self._bundle,
                role,
                self._task,
                examples,
                inputs,
                state,
                progress,
                schedule,
                after_step,
                self._threads,
            )
        except UpdateRejectedError:
            self._checkpoint.unlink(missing_ok=True)
            raise
        release_freed_memory()
        self._clock.train_s = time.perf_counter() - began_s

    def _enforce(self, plan: Plan, recorder: MemoryRecorder, save: Callable[[], None], step: int) -> None:
        """Stop when the process has gone over the budget, with the work so far in the checkpoint."""
        if self._budget_bytes is None or (peak_bytes := recorder.peak_bytes) <= self._budget_bytes:
            return
        save()
        required_bytes = max(plan.smallest_budget_bytes, -(-peak_bytes * 102 // 100 // 2**20) * 2**20)
        raise BudgetError(
            f"step {step}: the process peaked at {format_size(peak_bytes)}, the budget is "
            f"{format_size(self._budget_bytes)} (predicted: {format_size(plan.peak_bytes)}): the work so far "
            f"is in "
            f"{self._checkpoint}, continue with --resume --budget {required_bytes // 2**20}MiB",
            budget_bytes=self._budget_bytes,
            required_bytes=required_bytes,
        )

    def _keep(
        self, adapter: Adapter, trained: dict[str, npt.NDArray[np.float32]], report: AdaptReport
    ) -> None:
        updated = adapter.with_tensors({**adapter.tensors, **trained}, str(self._output))
        with atomic_folder(self._output, CONFIG_FILE) as folder:
            write_adapter(updated, folder)
            atomic_write(folder / REPORT_FILE, report.to_json().encode())
        self._checkpoint.unlink(missing_ok=True)

    def _fingerprint(self, adapter: Adapter, examples: list[Example], total_steps: int) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, by a name that people know."""
        data = hashlib.sha256()
        for example in examples:
            for row in example.rows:
                for array in (row.input_ids, row.type_ids, row.labels):
                    data.update(b"" if array is None else array.tobytes())
                    data.update(b"/")
            data.update(str(example.label).encode())
        start = hashlib.sha256(repr(sorted(adapter.config.items())).encode())
        for name in sorted(adapter.tensors):
            start.update(name.encode())
            start.update(adapter.tensors[name].tobytes())
        chosen = dataclasses.asdict(self._options)
        # These are known by what they lead to: the adapter's content, the data's tokens, the number of steps.
        for name in ("resume", "adapter", "seq_len", "steps", "epochs"):
            del chosen[name]
        return {
            "bundle": hash_file(self._bundle.path / MANIFEST_FILE).sha256,
            "data": data.hexdigest(),
            "adapter": start.hexdigest(),
            "steps": total_steps,
            **chosen,
        }


def _check_output(bundle: Bundle, output: Path) -> None:
    """Refuse outputs that would damage the bundle, whose manifest vouches for its own adapters."""
    check_replaceable(output, CONFIG_FILE)
    root = bundle.path.resolve()
    resolved = output.resolve()
    if not resolved.is_relative_to(root):
        return
    inside = resolved.relative_to(root).parts
    if len(inside) == 2 and inside[0] == "adapters" and inside[1] not in bundle.manifest.adapters:
        return
    raise UsageError(
        f"{output}: is part of the bundle, whose manifest vouches for its files: write outside it, or to a "
        f"new name below "
        f"{bundle.path / 'adapters'}"
    )


def workload(adapter: Adapter, names: list[str], rows: int, seq_len: int) -> Workload:
    """The sizes that training `names` of an adapter on batches of `rows` x `seq_len` tokens depends on."""
    return Workload(
        rows=rows,
        seq_len=seq_len,
        rank=max((adapter.rank(module) for module in adapter.modules), default=0),
        adapter_values=adapter.parameters,
        trained_values=sum(adapter.tensors[name].size for name in names),
    )


def _memory_report(budget_bytes: int | None, plan: Plan, recorder: MemoryRecorder) -> MemoryReport:
    parts = {
        name: getattr(plan, name)
        for name in ("process_bytes", "session_bytes", "activation_bytes", "state_bytes", "evaluation_bytes")
    }
    return MemoryReport(
        budget_bytes=budget_bytes,
        predicted_peak_bytes=plan.peak_bytes,
        predicted=parts,
        measured_peak_bytes=recorder.peak_bytes,
        peak_is_exact=recorder.resettable,
        timeline=list(recorder.samples),
        phases=list(recorder.phases),
    )
