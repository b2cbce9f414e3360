"""One update from beginning to end: plan, judge, train, judge again, keep or reject."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import edgepeft
from edgepeft.adapters import CONFIG_FILE, write_adapter
from edgepeft.bundle.manifest import Strategy
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BudgetError, BundleError, UpdateRejectedError, UsageError
from edgepeft.files import atomic_folder, atomic_write, check_replaceable, settle
from edgepeft.sizes import format_size

from ..adapters.graph_inputs import to_peft_layout
from ..memory.arena import renew_shared_arena
from ..memory.chain_cost import ChainCost
from ..memory.plan import Plan, suggested_budget
from ..memory.process import MemoryRecorder, read_memory, release_freed_memory
from ..records import RecordSource
from ..tasks import Example, Task
from .head.remembered import FloatArray, write_features
from .judging.candidates import TRAINED, Judging
from .judging.evaluate import Evaluation, Sink, evaluate
from .judging.verdict import Outcome, by_label, interval
from .model_card import CARD_FILE, model_card
from .options import TrainingOptions
from .preparation import Prepared, prepare
from .report import REPORT_FILE, AdaptReport, Candidate, HeldOut, MemoryReport, StepDown, read_report
from .state.checkpoint import checkpoint_path, is_finished, save_checkpoint
from .stepping_down import NEAR, cheaper
from .trainer import Schedule, Step, train

CHECKPOINT_STEPS = 10
"""Steps between two checkpoints."""

OnStep = Callable[[Step], None]


class _SteppingDown(Exception):
    """Leaves the training loop to go on with another plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.label)
        self.plan = plan


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
        on_step: called after every step; what it raises ends the update, with the work in the checkpoint.

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
        self._recorder = MemoryRecorder()
        self._step_s: list[float] = []
        self._plan: Plan | None = None  # the present one
        self._steps_down: list[StepDown] = []
        self._seconds = {"train": 0.0, "evaluate": 0.0}
        settle(self._output)
        settle(self._checkpoint)
        _check_output(bundle, self._output)

    def run(self) -> AdaptReport:
        """Do it; an update runs once.

        Raises:
            BudgetError: the budget cannot be met, before the first step or, with a checkpoint kept, later.
            UpdateRejectedError: the new adapter is worse on the held-out records, or no better than guessing;
                nothing is written.
            DataError: a record cannot be used, or there are too few.
            AdapterError: the starting adapter is damaged or does not fit.
            BundleError: the weights have changed on the disk meanwhile; nothing is written, nor is the work
                so far kept, which was done with them.
        """
        report_file = self._output / REPORT_FILE
        if self._options.resume and is_finished(self._checkpoint, report_file):
            self._checkpoint.unlink(missing_ok=True)
            return read_report(report_file)
        try:
            report, rejected = self._update()
        finally:
            self._task.virtual = None
        self._checkpoint.unlink(missing_ok=True)
        if rejected is not None:
            raise UpdateRejectedError(
                f"the update is rejected: {rejected.rejected}, so {self._output} is left as it was: "
                f"{rejected.remedy}",
                report.to_dict(),
            )
        return report

    def _update(self) -> tuple[AdaptReport, Outcome | None]:
        """The report, and the outcome if the update is rejected."""
        with self._recorder:
            began_s = time.perf_counter()
            self._recorder.mark("read records")
            prepared = prepare(
                self._bundle, self._task, self._source, self._output, self._options, self._budget_bytes
            )
            self._plan = prepared.plan
            release_freed_memory()  # the adapter as it was read
            resumed_from_step = prepared.progress.step
            judging = Judging(self._task, prepared, functools.partial(self._judge, prepared))
            outcome = self._train(prepared, judging) if prepared.total_steps else judging.fit_head_alone()
            features = judging.features() if outcome.rejected is None else {}
            report = self._report(prepared, outcome, resumed_from_step, began_s)
            try:
                self._bundle.check_weights()
            except BundleError:
                self._checkpoint.unlink(missing_ok=True)  # it was trained on them
                raise
            if outcome.rejected is not None:
                return report, outcome
            self._keep(prepared, outcome, report, features)
            return report, None

    def _train(self, prepared: Prepared, judging: Judging) -> Outcome:
        judging.begin()
        self._take_steps(prepared)
        return judging.end()

    def _judge(self, prepared: Prepared, examples: Sequence[Example], sink: Sink | None = None) -> Evaluation:
        """Loss and accuracy of the adapter as it is now."""
        self._recorder.mark("evaluate")
        began_s = time.perf_counter()
        plan = self._present
        renew_shared_arena(plan.evaluation_bytes or plan.activation_bytes)
        result = evaluate(
            self._bundle,
            self._task,
            prepared.state.inputs(prepared.inputs),
            examples,
            self._options.batch_size,
            self._strategy(),
            self._threads,
            sink,
        )
        renew_shared_arena()
        release_freed_memory()
        self._seconds["evaluate"] += time.perf_counter() - began_s
        return result

    @property
    def _present(self) -> Plan:
        assert self._plan is not None
        return self._plan

    def _strategy(self) -> Strategy:
        """That of the present plan."""
        strategies = self._bundle.manifest.strategies
        return next(item for item in strategies if item.name == self._present.strategy)

    def _take_steps(self, prepared: Prepared) -> None:
        manifest, progress = self._bundle.manifest, prepared.progress
        self._recorder.mark("train")
        self._recorder.forget_peak()  # that of reading and judging is no reason to train in another way
        began_s = last_s = time.perf_counter()

        def after_step(loss: float) -> None:
            nonlocal last_s
            self._step_s.append(time.perf_counter() - last_s)
            if progress.step % CHECKPOINT_STEPS == 0 or progress.step == prepared.total_steps:
                self._save(prepared)
            self._enforce(prepared)
            if self._on_step is not None:
                resident_bytes = read_memory().resident_bytes
                try:
                    self._on_step(Step(progress.step, prepared.total_steps, loss, resident_bytes))
                except BaseException:
                    self._save(prepared)
                    raise
            last_s = time.perf_counter()

        self._output.parent.mkdir(parents=True, exist_ok=True)
        while True:
            renew_shared_arena(self._present.activation_bytes)
            try:
                train(
                    self._bundle,
                    self._strategy(),
                    self._task,
                    prepared.train_on,
                    prepared.inputs,
                    prepared.state,
                    progress,
                    Schedule(
                        prepared.options,
                        prepared.total_steps,
                        manifest.policy.max_relative_change,
                        prepared.classes,
                        prepared.of_technique,
                        prepared.dropout.rate,
                    ),
                    after_step,
                    self._threads,
                    self._present.held,
                )
            except UpdateRejectedError:
                self._checkpoint.unlink(missing_ok=True)
                raise
            except _SteppingDown as stepping:
                self._step_down(prepared, stepping.plan)
            else:
                break
        renew_shared_arena()
        release_freed_memory()
        self._seconds["train"] = time.perf_counter() - began_s

    def _save(self, prepared: Prepared) -> None:
        save_checkpoint(self._checkpoint, prepared.fingerprint, prepared.state, prepared.progress)

    def _step_down(self, prepared: Prepared, plan: Plan) -> None:
        """Go on with a cheaper plan; the sessions of the last one are closed."""
        before, self._plan = self._present, plan
        peak_bytes = self._recorder.recent_peak_bytes
        self._steps_down.append(
            StepDown(prepared.progress.step, peak_bytes, before.peak_bytes, before.label, plan.label)
        )
        if plan.updates_in_backward:
            prepared.state.pass_gradients()
        if plan.state_in_file and not before.state_in_file:
            prepared.state.move_to_file(self._output.parent)
        renew_shared_arena()
        release_freed_memory()
        self._recorder.forget_peak()

    def _cost(self, prepared: Prepared) -> ChainCost | None:
        manifest = self._bundle.manifest
        partition = manifest.partition
        return None if partition is None else ChainCost(manifest, partition, prepared.sizes)

    def _enforce(self, prepared: Prepared) -> None:
        """Step down near the budget; over it with nothing cheaper left, stop with the work in the
        checkpoint."""
        if self._budget_bytes is None:
            return
        peak_bytes = self._recorder.recent_peak_bytes
        if peak_bytes <= NEAR * self._budget_bytes:
            return
        plan = cheaper(self._present, prepared.candidates, self._cost(prepared))
        if plan is not None and prepared.progress.step < prepared.total_steps:
            raise _SteppingDown(plan)
        if peak_bytes <= self._budget_bytes:
            return
        self._save(prepared)
        plan = self._present
        required_bytes = max(plan.smallest_budget_bytes, suggested_budget(peak_bytes))
        raise BudgetError(
            f"step {prepared.progress.step}: the process peaked at {format_size(peak_bytes)}, the budget is "
            f"{format_size(self._budget_bytes)} (predicted: {format_size(plan.peak_bytes)}): the work so "
            f"far is in {self._checkpoint}, continue with --resume --budget {required_bytes // 2**20}MiB",
            budget_bytes=self._budget_bytes,
            required_bytes=required_bytes,
        )

    def _keep(
        self, prepared: Prepared, outcome: Outcome, report: AdaptReport, features: dict[str, FloatArray]
    ) -> None:
        trained = to_peft_layout(self._bundle, prepared.state.parameters)
        adapter = prepared.adapter.with_tensors({**prepared.untrained, **trained}, str(self._output))
        if outcome.chosen.name == TRAINED:
            adapter = prepared.of_technique.finished(adapter)
        with atomic_folder(self._output, CONFIG_FILE) as folder:
            write_adapter(adapter, folder)
            write_features(folder, features)
            atomic_write(folder / REPORT_FILE, report.to_json().encode())
            atomic_write(folder / CARD_FILE, model_card(report, adapter).encode())

    def _report(
        self, prepared: Prepared, outcome: Outcome, resumed_from_step: int, began_s: float
    ) -> AdaptReport:
        progress, before, after = prepared.progress, outcome.before.evaluation, outcome.chosen.evaluation
        targets, said, floor = self._task.targets, after.said, outcome.trivial
        judged_items = 0 if said is None else len(said.targets)
        held_out = len(prepared.held_out) if prepared.total_steps else 0
        return AdaptReport(
            edgepeft_version=edgepeft.__version__,
            task=self._bundle.manifest.task,
            model=self._bundle.manifest.model.name,
            started_from=prepared.adapter.origin,
            output=str(self._output),
            decision="kept" if outcome.rejected is None else "rejected",
            strategy=self._present.label,
            stepped_down=self._steps_down,
            exact_gradients=prepared.plan.exact,
            options=dataclasses.asdict(prepared.options),
            dropout=prepared.dropout,
            trained_tensors=len(prepared.state.parameters),
            trained_values=prepared.state.count,
            records={
                "train": len(prepared.train_on),
                "held_out": held_out,
                "truncated": prepared.examples.truncated,
                "left_out": prepared.examples.left_out,
                "remembered": sum(len(rows) for rows in prepared.held.values()),
            },
            first_left_out=prepared.examples.first_left_out,
            steps=progress.step,
            resumed_from_step=resumed_from_step,
            losses=progress.losses,
            learning_rates=progress.learning_rates,
            grad_norms=progress.grad_norms,
            limited_steps=progress.limited_steps,
            relative_change=prepared.state.relative_change(),
            judged_by=outcome.judged_by,
            chosen=outcome.chosen.name,
            candidates=[
                Candidate(item.name, item.evaluation.loss, item.evaluation.accuracy, item.loss)
                for item in (outcome.before, *outcome.candidates)
            ],
            held_out_before=HeldOut(before.loss, before.accuracy),
            held_out_after=HeldOut(after.loss, after.accuracy),
            trivial=None if floor is None else HeldOut(floor.loss, floor.accuracy),
            accuracy_interval=(
                interval(after.accuracy, judged_items)
                if after.accuracy is not None and judged_items
                else None
            ),
            by_label={} if said is None or targets is None else by_label(said, targets),
            seconds={
                "total": time.perf_counter() - began_s,
                **self._seconds,
                "step": float(np.median(self._step_s)) if self._step_s else 0.0,
            },
            memory=self._memory_report(),
        )

    def _memory_report(self) -> MemoryReport:
        """Of the whole run, and the prediction for how it ended."""
        plan = self._present
        parts = ("process_bytes", "session_bytes", "activation_bytes", "state_bytes", "evaluation_bytes")
        return MemoryReport(
            budget_bytes=self._budget_bytes,
            predicted_peak_bytes=plan.peak_bytes,
            predicted={name: getattr(plan, name) for name in parts},
            measured_peak_bytes=self._recorder.peak_bytes,
            last_peak_bytes=self._recorder.recent_peak_bytes,
            peak_is_exact=self._recorder.peak_is_exact,
            timeline=list(self._recorder.samples),
            phases=list(self._recorder.phases),
        )


def _check_output(bundle: Bundle, output: Path) -> None:
    """Refuse outputs that cannot be written, and those that would damage the bundle, whose manifest vouches
    for its own adapters."""
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
        f"new name below {bundle.path / 'adapters'}"
    )
