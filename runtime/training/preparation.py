"""What an update knows before its first session is opened: the adapter, the records, the plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import LinearHead
from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import DataError, UsageError

from ..adapters.graph_inputs import graph_inputs
from ..adapters.virtual_tokens import of_adapter
from ..memory.plan import Plan, Workload
from ..memory.planner import choose, judging_alone, plans, with_features
from ..memory.process import read_memory, release_freed_memory
from ..records import RecordSource, records
from ..tasks import Example, Task
from .defaults import FEW, with_defaults
from .examples import Examples
from .head.closed_form import trained_head
from .head.remembered import read_features
from .head.ridge import features_bytes
from .options import TrainingOptions
from .report import DropoutReport
from .sampling import split, steps_per_epoch
from .starting import starting_adapter, trained_names, with_labels
from .state.buffers import TrainingState
from .state.checkpoint import Progress, checkpoint_path, load_checkpoint
from .state.fingerprint import fingerprint
from .steps.dropout import dropout_of
from .techniques import steps_that_train
from .techniques.base import Steps
from .workload import own_tokens, workload


@dataclass(frozen=True)
class Prepared:
    """`adapter` is without its tensors: those that train are in `state`, the others in `untrained`, and
    `inputs` are the graph's that do not train. `candidates` are the plans that `plan` was chosen from, for
    batches of `sizes`. `head` is what can be fitted in closed form, and all there is to do where there are no
    steps: then all records are trained on and, one at a time, held out. `held` are features of records of
    other labels, by label, that the adapter kept. `classes` are those of the records to train on, where they
    have any. In `options` nothing is left open that steps need. `of_technique` is what the adapter's
    technique does in these."""

    options: TrainingOptions
    head: LinearHead | None
    held: dict[str, npt.NDArray[np.float32]]
    adapter: Adapter
    untrained: dict[str, npt.NDArray[np.float32]]
    plan: Plan
    candidates: list[Plan]
    sizes: Workload
    examples: Examples
    train_on: Sequence[Example]
    classes: npt.NDArray[np.int64] | None
    held_out: Sequence[Example]
    total_steps: int
    inputs: dict[str, npt.NDArray[np.float32]]
    state: TrainingState
    fingerprint: dict[str, Any]
    progress: Progress
    dropout: DropoutReport
    of_technique: Steps


def prepare(
    bundle: Bundle,
    task: Task,
    source: RecordSource,
    output: Path,
    options: TrainingOptions,
    budget_bytes: int | None,
) -> Prepared:
    """Read the adapter and the records, and plan; arguments as for `Update`.

    Raises:
        BudgetError: the budget cannot be met.
        UsageError: an option cannot be used.
        DataError: a record cannot be used, or there are too few.
        AdapterError: the starting adapter is damaged or does not fit.
    """
    adapter = starting_adapter(bundle, options)
    if options.add_labels:
        adapter = with_labels(bundle, adapter, options.add_labels)
    task.know(adapter.labels or bundle.manifest.model.labels)
    names = trained_names(bundle.manifest, adapter, options)
    task.virtual = of_adapter(bundle.manifest, adapter)
    # Beside the output: where a disk of memory is mounted for temporary files, they would be in memory.
    folder = next(parent for parent in output.parents if parent.exists())
    examples = Examples(task, records(source), own_tokens(bundle.manifest, adapter, options), folder)
    task.release()
    count = len(examples)
    head = trained_head(bundle.manifest, names)
    classes = classes_of(examples, task)
    held = {}
    if head is not None and classes is not None and not options.starts_fresh:
        held = _held(adapter, head, classes, task)
    if options.add_labels and not held:
        _check_old_labels(bundle, classes, task)
    _check_several_labels(classes, len(held), task)
    if count < 2:
        head = None
    if options.trainable == "head" and head is None:
        raise UsageError(
            "trainable is 'head', which is for records of two or more labels and a bundle with a linear head "
            "that its policy lets train without a bound: train modules_to_save instead"
        )
    alone = head is not None and (
        options.trainable == "head"
        or (
            options.trainable == "all"
            and options.steps is options.epochs is None
            and (count < FEW or bool(held))  # what is held would no longer be true of a model that trains
        )
    )
    if alone and head is not None:
        names = [name for name in names if name in (head.weight, head.bias)]
        train_on = held_out = np.arange(count)
        total_steps = 0
    else:
        train_on, held_out = split(count, options.eval_fraction, options.seed, task.minimum_batch, classes)
        options = with_defaults(options, bundle.manifest, len(train_on))
        total_steps = _total_steps(bundle, task, options, len(train_on))
    steps = steps_that_train(adapter, names)
    if total_steps:
        adapter = steps.prepared(adapter, names, total_steps, fresh=options.starts_fresh)
    rows = min(options.batch_size, count) * task.rows_per_record
    sizes = workload(adapter, names, rows, examples.longest, options)
    candidates = plans_now(bundle, sizes, budget_bytes)
    if options.strategy is not None:
        candidates = [item for item in candidates if item.strategy == options.strategy]
    if not candidates:
        raise UsageError(
            f"{adapter.technique.title} needs gradients, which {options.strategy} only estimates: leave out "
            "--strategy, or train another method"
        )
    if alone:
        candidates = judging_alone(candidates)
    if head is not None:
        width = adapter.tensors[head.weight].shape[1]
        counted = task.label_count(examples) + sum(len(rows) for rows in held.values())
        candidates = with_features(candidates, features_bytes(width, counted))
    plan = choose(candidates, budget_bytes, [] if alone or head is None else judging_alone(candidates))
    inputs = graph_inputs(bundle, [(adapter, 1.0)])
    file_in = output.parent if plan.state_in_file else None
    optimizer = OPTIMIZER_STATES[options.optimizer_state] if plan.exact else None
    start = {name: inputs.pop(name) for name in names}
    state = TrainingState(
        start,
        file_in,
        optimizer,
        adds_up=options.accumulation_steps > 1,
        passing=plan.updates_in_backward,
        averages=steps.averages,
    )
    del start
    known_by = fingerprint(bundle, options, adapter, examples.digest, total_steps, plan.exact)
    progress = load_checkpoint(checkpoint_path(output), known_by, state) if options.resume else None
    progress = progress or Progress()
    # The trained tensors are in the state now, so the adapter's own go.
    untrained = {name: value for name, value in adapter.tensors.items() if name not in state.parameters}
    return Prepared(
        options=options,
        head=head,
        held=held if alone else {},
        adapter=adapter.with_tensors({}, adapter.origin),
        untrained=untrained,
        plan=plan,
        candidates=candidates,
        sizes=sizes,
        examples=examples,
        train_on=examples.part(train_on),
        classes=None if classes is None else classes[train_on],
        held_out=examples.part(held_out),
        total_steps=total_steps,
        inputs=inputs,
        state=state,
        fingerprint=known_by,
        progress=progress,
        of_technique=steps(adapter, bundle.manifest.slots, state, progress.of_technique),
        dropout=dropout_of(bundle.manifest, adapter, exact=plan.exact),
    )


def classes_of(examples: Sequence[Example], task: Task) -> npt.NDArray[np.int64] | None:
    """The class of each record, where it has one."""
    if task.targets is None:
        return None
    labels = [example.label for example in examples]
    return np.array(labels, np.int64) if all(isinstance(label, int) for label in labels) else None


def _held(
    adapter: Adapter, head: LinearHead, classes: npt.NDArray[np.int64], task: Task
) -> dict[str, npt.NDArray[np.float32]]:
    """What the adapter kept of labels that no record has."""
    assert task.targets is not None
    present = set(classes.tolist())
    missing = [name for index, name in enumerate(task.targets.names) if index not in present]
    return read_features(Path(adapter.origin), missing, adapter.tensors[head.weight].shape[1])


def _check_old_labels(bundle: Bundle, classes: npt.NDArray[np.int64] | None, task: Task) -> None:
    """Refuse records that have only labels which are added: what learns from them alone forgets the others.

    Raises:
        DataError: names the labels that records are missing of.
    """
    if classes is None or task.targets is None:
        return
    known = bundle.manifest.model.labels
    if min(classes.tolist()) >= len(known):
        raise DataError(
            f"the records have only labels that are added: what learns from these alone forgets "
            f"{', '.join(known[:10])}{', …' if len(known) > 10 else ''}: give records of them too, or start "
            "from an adapter that edgepeft has taught them, which keeps what it needs"
        )


def _check_several_labels(classes: npt.NDArray[np.int64] | None, held: int, task: Task) -> None:
    """Refuse records that all have one label, and no other is held.

    Raises:
        DataError: they do.
    """
    if classes is None or task.targets is None or len(classes) < 2 or len({*classes.tolist()}) + held > 1:
        return
    raise DataError(
        f"all {len(classes)} records have the label {task.targets.names[int(classes[0])]!r}: what learns "
        "from these alone says it of everything: give records of another label too"
    )


def plans_now(bundle: Bundle, sizes: Workload, budget_bytes: int | None, later_bytes: int = 0) -> list[Plan]:
    """What every strategy would need in this process, which holds an adapter as it was read, no session, and
    `later_bytes` more once the records have been read.

    Raises:
        UsageError: the bundle cannot be trained.
    """
    release_freed_memory()
    return plans(bundle.manifest, sizes, read_memory().resident_bytes + later_bytes, budget_bytes)


def _total_steps(bundle: Bundle, task: Task, options: TrainingOptions, count: int) -> int:
    per_epoch = steps_per_epoch(count, options.records_per_step, task.minimum_batch)
    total = options.steps or (options.epochs or 1) * per_epoch
    limit = bundle.manifest.policy.max_steps
    if limit is not None and total > limit:
        raise UsageError(
            f"{options.epochs} epochs of {count} records are {total} steps, the bundle's policy allows "
            f"{limit} an update: give --steps {limit}"
        )
    return total
