"""Predicting the peak of a run from the manifest's formulas, and refusing what the budget cannot hold."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from edgepeft.bundle.manifest import CHECKPOINTED, RESIDENT, STREAMED, Manifest, Strategy
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.errors import BudgetError, UsageError
from edgepeft.sizes import format_size

from ..inputs import has_drift_penalty, model_inputs
from .chain_cost import ChainCost, largest_stage_bytes, mapped_row_bytes, row_bytes
from .plan import NOTHING_HELD, Held, Plan, Workload, suggested_budget

CHUNK_VALUES = 2**16
"""Values that the optimizer graphs see at a time."""

# The optimizer and norm sessions (about 0.3 MiB each, measured) and their intermediates of one chunk.
_OPTIMIZER_BYTES = 2**20 + 12 * 4 * CHUNK_VALUES
# Of the adapter, while it trains: a value and what it started from, or PEFT's layout of what does not train.
_BYTES_PER_VALUE = 4 + 4
# A piece of the direction that forward-only training goes in.
_DIRECTION_BYTES = 4 * CHUNK_VALUES
# Where the state is in a file, what the optimizer reads of it at a time.
_READ_BYTES = 8 * 4 * CHUNK_VALUES
# Weights of the next stage that are read ahead; larger ones would cost more than they save.
_READ_AHEAD_BYTES = 16 * 2**20
# Of the inputs of stages, one in so many is kept where memory is shorter still.
_STRIDES = (2, 4)
# The loss graph holds the outputs it is given, their log-softmax and a temporary of that size.
_LOSS_COPIES = 3
# See `_batch_bytes`.
_BATCHES = 3
# What the first run touches beside tensors (code, stacks): on MiniLM, six sizes of batches from 2 x 32 to
# 32 x 16 measured 3 to 4 MiB.
_FIRST_RUN_BYTES = 4 * 2**20


def plans(
    manifest: Manifest, workload: Workload, process_bytes: int, budget_bytes: int | None = None
) -> list[Plan]:
    """What every strategy of the bundle that will do would need, cheapest in time first.

    Args:
        manifest: the bundle's manifest.
        workload: the sizes.
        process_bytes: what the process holds before any session is opened, the adapter's tensors included as
            they were read; those are gone when training begins, and its state is counted apart.
        budget_bytes: what there is; what a strategy leaves of it, it uses to save time. None: no limit.

    Raises:
        UsageError: the bundle cannot be trained.
    """
    if not manifest.strategies:
        no_train = "it was exported with --no-train: export it again without, to adapt it"
        raise UsageError(f"the bundle cannot be trained: {manifest.missing.get(RESIDENT, no_train)}")
    process_bytes = max(process_bytes - 4 * workload.adapter_values, 0)
    found = []
    for strategy in manifest.strategies:
        if strategy.graph is not None:
            found.append(_resident(manifest, strategy, strategy.graph, workload, process_bytes))
        elif not strategy.exact:
            if not workload.needs_gradients:
                found.append(_forward_only(manifest, strategy, workload, process_bytes))
        else:
            found += _staged(manifest, strategy, workload, process_bytes, budget_bytes)
    if not found:
        raise UsageError(
            "the adapter's method needs gradients, which this bundle can only estimate: train another method"
        )
    return found


def _resident(
    manifest: Manifest, strategy: Strategy, graph: str, workload: Workload, process_bytes: int
) -> Plan:
    inference = manifest.inference_memory
    sizes = (workload.rows, workload.seq_len, workload.rank)
    partition = manifest.partition
    tokens = workload.rows * workload.seq_len
    looked_up_bytes = 0 if partition is None else mapped_row_bytes(manifest, partition, tokens)
    inference_bytes = inference.session_bytes + looked_up_bytes + run_bytes(inference.arena_bytes(*sizes))
    # A drift penalty has the base model run beside the training graph.
    base_bytes = inference_bytes if has_drift_penalty(manifest) else 0
    return Plan(
        strategy=strategy.name,
        exact=strategy.exact,
        process_bytes=process_bytes,
        session_bytes=strategy.memory.session_bytes + looked_up_bytes,
        activation_bytes=run_bytes(strategy.memory.arena_bytes(*sizes)) + base_bytes,
        state_bytes=_state_bytes(workload) + _batch_bytes(manifest, graph, workload),
        evaluation_bytes=inference_bytes + _loss_bytes(manifest, workload),
    )


def _staged(
    manifest: Manifest,
    strategy: Strategy,
    workload: Workload,
    process_bytes: int,
    budget_bytes: int | None,
) -> list[Plan]:
    """Plans of a chain: in memory and, where pages of weights need not stay, with the state in a file too."""
    partition = manifest.partition
    assert partition is not None
    cost = ChainCost(manifest, partition, workload)
    # A stage's gradients, as they come and where they are kept.
    passing_bytes = 2 * 4 * workload.trained_values // len(partition.stages)
    state_bytes = _state_bytes(workload)
    if workload.updates_in_backward:
        state_bytes += passing_bytes - workload.gradient_bytes * workload.trained_values
    bare = Plan(
        strategy=strategy.name,
        exact=strategy.exact,
        process_bytes=process_bytes,
        session_bytes=strategy.memory.session_bytes + _embedding_bytes(manifest, workload),
        activation_bytes=run_bytes(
            strategy.memory.arena_bytes(workload.rows, workload.seq_len, workload.rank)
        ),
        state_bytes=state_bytes + _batch_bytes(manifest, "train", workload),
        evaluation_bytes=0,  # in stages, judging is a part of what training does
        stages=len(partition.stages),
        updates_in_backward=workload.updates_in_backward,
        relative_step=cost.relative_step(NOTHING_HELD),
    )
    if strategy.name == CHECKPOINTED:
        more_bytes = cost.weight_bytes - largest_stage_bytes(manifest, partition)
        bare = dataclasses.replace(
            bare, held=Held(weights=True), session_bytes=bare.session_bytes + more_bytes
        )
        return [cost.filled(bare, budget_bytes)]
    ahead_bytes = largest_stage_bytes(manifest, partition)
    in_file = dataclasses.replace(
        bare,
        held=Held(cached=ahead_bytes > _READ_AHEAD_BYTES),
        session_bytes=bare.session_bytes + (ahead_bytes if ahead_bytes <= _READ_AHEAD_BYTES else 0),
        state_in_file=True,
        state_bytes=_READ_BYTES
        + _BYTES_PER_VALUE * (workload.adapter_values - workload.trained_values)
        + passing_bytes
        + _OPTIMIZER_BYTES
        + _batch_bytes(manifest, "train", workload),
    )
    # Half of what is left is the system's, for pages of weights that it need not read again.
    half = None if budget_bytes is None else (budget_bytes + bare.peak_bytes) // 2
    return [
        cost.filled(bare, half),
        in_file,
        *(_strided(in_file, cost, stride, strategy.memory) for stride in _STRIDES),
    ]


def judging_alone(candidates: list[Plan]) -> list[Plan]:
    """The plans of an update that takes no step and only judges: with the inference graph, or in stages, of
    whose memory the formula of forward-only training tells."""
    found = [
        dataclasses.replace(plan, session_bytes=0, activation_bytes=0)
        for plan in candidates
        if plan.evaluation_bytes
    ]
    forward = next((plan for plan in candidates if not plan.exact), None)
    in_stages = next((plan for plan in candidates if plan.strategy == STREAMED), None)
    if forward is not None and in_stages is not None:
        found.append(
            dataclasses.replace(
                in_stages,
                session_bytes=forward.session_bytes,
                activation_bytes=forward.activation_bytes,
                held=NOTHING_HELD,
                state_in_file=False,
            )
        )
    return found or candidates


def with_features(candidates: list[Plan], features_bytes: int) -> list[Plan]:
    """The plans with so many bytes of features beside what judging takes."""
    return [
        dataclasses.replace(plan, evaluation_bytes=plan.evaluation_bytes + features_bytes)
        if plan.evaluation_bytes
        else dataclasses.replace(plan, activation_bytes=plan.activation_bytes + features_bytes)
        for plan in candidates
    ]


def _strided(plan: Plan, cost: ChainCost, stride: int, memory: MemoryFormula) -> Plan:
    held = dataclasses.replace(plan.held, stride=stride)
    spared_bytes = int((1 + memory.arena_gaps) * cost.spared_bytes(stride))
    return dataclasses.replace(
        plan,
        held=held,
        activation_bytes=plan.activation_bytes - spared_bytes,
        relative_step=cost.relative_step(held),
    )


def _forward_only(manifest: Manifest, strategy: Strategy, workload: Workload, process_bytes: int) -> Plan:
    """Without a partition, the loss is that of the inference graph's output."""
    sizes = (workload.rows, workload.seq_len, workload.rank)
    loss_bytes = _loss_bytes(manifest, workload) if manifest.partition is None else 0
    embedding_bytes = 0 if manifest.partition is None else _embedding_bytes(manifest, workload)
    return Plan(
        strategy=strategy.name,
        exact=strategy.exact,
        process_bytes=process_bytes,
        session_bytes=strategy.memory.session_bytes + embedding_bytes,
        activation_bytes=run_bytes(strategy.memory.arena_bytes(*sizes)) + loss_bytes,
        state_bytes=_adapter_bytes(workload) + _DIRECTION_BYTES + _batch_bytes(manifest, "train", workload),
        evaluation_bytes=0,  # judging is what training does
        relative_step=None,
    )


def _embedding_bytes(manifest: Manifest, workload: Workload) -> int:
    """What looking rows up takes beyond the largest stage's weights, which the session's bytes count."""
    assert manifest.partition is not None
    mapped_bytes = row_bytes(manifest, manifest.partition, workload.rows * workload.seq_len)
    return max(mapped_bytes - largest_stage_bytes(manifest, manifest.partition), 0)


def _state_bytes(workload: Workload) -> int:
    """Of a state in memory."""
    per_value_bytes = workload.gradient_bytes + workload.moment_bytes
    return _adapter_bytes(workload) + int(per_value_bytes * workload.trained_values) + _OPTIMIZER_BYTES


def _adapter_bytes(workload: Workload) -> int:
    """Graph inputs, and what is kept to measure the update against."""
    return _BYTES_PER_VALUE * workload.adapter_values


def choose(candidates: list[Plan], budget_bytes: int | None, head_alone: Sequence[Plan] = ()) -> Plan:
    """The fastest plan that fits the budget; without a budget, the first.

    One without exact gradients is chosen only where there is no other.

    Args:
        candidates: what there is.
        budget_bytes: the limit; None for none.
        head_alone: plans of what takes less, a head in closed form, to be named where nothing fits.

    Raises:
        BudgetError: none fits; the error names the smallest budget that would do.
    """
    eligible = [plan for plan in candidates if plan.exact] or candidates
    if budget_bytes is None:
        return eligible[0]
    fitting = [plan for plan in eligible if plan.fits(budget_bytes)]
    if fitting:
        return min(fitting, key=lambda plan: plan.relative_step or 1.0)
    best = min(eligible, key=lambda plan: plan.peak_bytes)
    required_bytes = best.smallest_budget_bytes
    others = (plan for plan in candidates if plan not in eligible and plan.fits(budget_bytes))
    other = next(others, None)
    remedy = ""
    if head := [plan for plan in head_alone if plan.fits(budget_bytes)]:
        peak_bytes = min(plan.peak_bytes for plan in head)
        remedy = f"; --trainable head fits with {format_size(peak_bytes)}: a classifier's last layer, no LoRA"
    elif other is not None:
        remedy = (
            f"; --strategy {other.strategy} fits with {format_size(other.peak_bytes)}, but estimates its "
            "gradients and needs many more steps"
        )
    raise BudgetError(
        f"training needs {format_size(best.peak_bytes)} with strategy {best.label} (process "
        f"{format_size(best.process_bytes)}, session {format_size(best.session_bytes)}, activations "
        f"{format_size(best.activation_bytes)}, adapter and optimizer {format_size(best.state_bytes)}, "
        f"evaluation {format_size(best.evaluation_bytes)}) and 2 % to spare, the budget is "
        f"{format_size(budget_bytes)}: give at least --budget {required_bytes // 2**20}MiB, or lower "
        f"--batch-size or --seq-len{remedy}",
        budget_bytes=budget_bytes,
        required_bytes=required_bytes,
    )


def check_run(
    memory: MemoryFormula,
    budget_bytes: int,
    process_bytes: int,
    *,
    shape: tuple[int, int],
    rank: int,
) -> None:
    """Refuse a run of one graph that the budget cannot hold.

    Args:
        memory: the graph's formula.
        budget_bytes: limit on the process's resident memory.
        process_bytes: what it holds without the session.
        shape: rows and tokens of the batch.
        rank: the largest rank of the adapter.

    Raises:
        BudgetError: names the smallest budget that would do.
    """
    activation_bytes = run_bytes(memory.arena_bytes(*shape, rank))
    peak_bytes = process_bytes + memory.session_bytes + activation_bytes
    if peak_bytes <= budget_bytes:
        return
    required_bytes = suggested_budget(peak_bytes)
    raise BudgetError(
        f"{shape[0]} rows of {shape[1]} tokens need {format_size(peak_bytes)} (process "
        f"{format_size(process_bytes)}, session {format_size(memory.session_bytes)}, activations "
        f"{format_size(activation_bytes)}), the budget is {format_size(budget_bytes)}: give at least "
        f"{required_bytes // 2**20}MiB, or smaller batches or shorter texts",
        budget_bytes=budget_bytes,
        required_bytes=required_bytes,
    )


def run_bytes(arena_bytes: int) -> int:
    """What a run adds to the process whose arena takes so many bytes."""
    return arena_bytes + _FIRST_RUN_BYTES


def _loss_bytes(manifest: Manifest, workload: Workload) -> int:
    """What evaluating the loss of one batch of outputs holds beside the outputs themselves."""
    _, *shape = manifest.graphs["inference"].outputs[0].shape
    width = math.prod(dim if isinstance(dim, int) else workload.seq_len for dim in shape)
    if manifest.task == "feature-extraction":
        width += workload.rows  # each row's cosines with the others
    return _LOSS_COPIES * 4 * workload.rows * width


def _batch_bytes(manifest: Manifest, role: str, workload: Workload) -> int:
    """What batches of the caller's inputs hold: while one is made, its examples and the batch before it are
    there as well."""
    values = model_inputs(manifest, manifest.graphs[role].inputs).values()
    sizes = {"batch": workload.rows}
    return _BATCHES * sum(
        np.dtype(spec.dtype).itemsize
        * math.prod(dim if isinstance(dim, int) else sizes.get(dim, workload.seq_len) for dim in spec.shape)
        for spec in values
    )
