"""Predicting the peak of a run from the manifest's formulas, and refusing what the budget cannot hold."""

import math
from dataclasses import dataclass

import numpy as np

from edgepeft.bundle.manifest import Manifest, MemoryFormula
from edgepeft.errors import BudgetError, UsageError
from edgepeft.runtime.inputs import has_drift_penalty, model_inputs
from edgepeft.sizes import format_size

CHUNK_VALUES = 2**16
"""Values that the optimizer graphs see at a time."""

# The optimizer and norm sessions (about 0.3 MiB each, measured) and their intermediates of one chunk.
_OPTIMIZER_BYTES = 2**20 + 12 * 4 * CHUNK_VALUES
# Parameters, gradients and two moments, float32 each; the values that training starts from take the place of
# the adapter's own, which the process holds already.
_BYTES_PER_TRAINED_VALUE = 4 * 4
_BYTES_PER_MAPPED_MOMENTS = 2 * 4
# The loss graph holds the outputs it is given, their log-softmax and a temporary of that size.
_LOSS_COPIES = 3
# Gaps in the arena, per byte of tensors, and what the first run touches beside them (code, stacks): on
# MiniLM, six sizes of batches from 2 x 32 to 32 x 16 measured 0.07 to 0.12 and 3 to 4 MiB.
_ARENA_GAPS = 0.12
_FIRST_RUN_BYTES = 4 * 2**20
# A later process is never of exactly this one's size, so a suggested budget leaves this much.
_MARGIN = 1.02


@dataclass(frozen=True)
class Workload:
    """The sizes a plan depends on.

    Attributes:
        rows: rows of a batch (a pair of sentences is two).
        seq_len: tokens (or samples) of the longest row; 1 for images.
        rank: the largest rank of the adapter.
        adapter_values: values in the adapter.
        trained_values: those of them that train.
    """

    rows: int
    seq_len: int
    rank: int
    adapter_values: int
    trained_values: int


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one strategy, in bytes, by what it is made of."""

    strategy: str
    exact: bool
    process_bytes: int
    session_bytes: int
    activation_bytes: int
    state_bytes: int
    evaluation_bytes: int
    mapped_moments: bool = False

    @property
    def label(self) -> str:
        """The strategy, and where the optimizer's moments are if not in memory."""
        return f"{self.strategy}, moments in a file" if self.mapped_moments else self.strategy

    @property
    def training_bytes(self) -> int:
        """Peak while training."""
        return self.process_bytes + self.session_bytes + self.activation_bytes + self.state_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak of the whole update: training, or the evaluation before and after it."""
        return max(self.training_bytes, self.process_bytes + self.state_bytes + self.evaluation_bytes)

    @property
    def smallest_budget_bytes(self) -> int:
        """The budget to suggest: the peak and a small margin, in whole mebibytes."""
        return suggested_budget(self.peak_bytes)


def plans(manifest: Manifest, workload: Workload, process_bytes: int) -> list[Plan]:
    """What every strategy of the bundle would need, cheapest in time first.

    Args:
        manifest: the bundle's manifest.
        workload: the sizes.
        process_bytes: what the process holds before any session is opened.

    Raises:
        UsageError: the bundle cannot be trained.
    """
    if not manifest.strategies:
        raise UsageError("the bundle was exported with --no-train: export it again without, to adapt it")
    inference = manifest.inference_memory
    sizes = (workload.rows, workload.seq_len, workload.rank)
    evaluation_bytes = (
        inference.session_bytes
        + run_bytes(inference.activation_bytes(*sizes))
        + _loss_bytes(manifest, workload)
    )
    untrained = workload.adapter_values - workload.trained_values
    state_bytes = _BYTES_PER_TRAINED_VALUE * workload.trained_values + 4 * untrained + _OPTIMIZER_BYTES
    base_bytes = (0, 0)
    if has_drift_penalty(manifest):  # the base model runs beside the training graph
        base_bytes = inference.session_bytes, run_bytes(inference.activation_bytes(*sizes))
    mapped_bytes = _BYTES_PER_MAPPED_MOMENTS * workload.trained_values
    return [
        Plan(
            strategy=strategy.name,
            exact=strategy.exact,
            process_bytes=process_bytes,
            session_bytes=strategy.memory.session_bytes + base_bytes[0],
            activation_bytes=run_bytes(strategy.memory.activation_bytes(*sizes)) + base_bytes[1],
            state_bytes=state_bytes
            + _batch_bytes(manifest, strategy.graph or "train", workload)
            - (mapped_bytes if mapped_moments else 0),
            # In stages, judging is a part of what training does.
            evaluation_bytes=evaluation_bytes if strategy.graph else 0,
            mapped_moments=mapped_moments,
        )
        for strategy in manifest.strategies
        for mapped_moments in ((False,) if strategy.graph else (False, True))
    ]


def choose(candidates: list[Plan], budget_bytes: int | None) -> Plan:
    """The first plan that fits the budget; without a budget, the first.

    Raises:
        BudgetError: none fits; the error names the smallest budget that would do.
    """
    if budget_bytes is None:
        return candidates[0]
    for plan in candidates:
        if plan.peak_bytes <= budget_bytes:
            return plan
    best = min(candidates, key=lambda plan: plan.peak_bytes)
    required_bytes = best.smallest_budget_bytes
    raise BudgetError(
        f"training needs {format_size(best.peak_bytes)} with strategy {best.label} (process "
        f"{format_size(best.process_bytes)}, session {format_size(best.session_bytes)}, activations "
        f"{format_size(best.activation_bytes)}, adapter and optimizer {format_size(best.state_bytes)}, "
        f"evaluation {format_size(best.evaluation_bytes)}), the budget is {format_size(budget_bytes)}: give "
        f"at least --budget {required_bytes // 2**20}MiB, or lower --batch-size or --seq-len",
        budget_bytes=budget_bytes,
        required_bytes=required_bytes,
    )


def suggested_budget(peak_bytes: int) -> int:
    """A peak and a small margin, in whole mebibytes."""
    return math.ceil(peak_bytes * _MARGIN / 2**20) * 2**20


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
    activation_bytes = run_bytes(memory.activation_bytes(*shape, rank))
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


def run_bytes(tensor_bytes: int) -> int:
    """What a run adds to the process for tensors of so many bytes."""
    return tensor_bytes + int(_ARENA_GAPS * tensor_bytes) + _FIRST_RUN_BYTES


def _loss_bytes(manifest: Manifest, workload: Workload) -> int:
    """What evaluating the loss of one batch of outputs holds beside the outputs themselves."""
    _, *shape = manifest.graphs["inference"].outputs[0].shape
    width = math.prod(dim if isinstance(dim, int) else workload.seq_len for dim in shape)
    if manifest.task == "feature-extraction":
        width += workload.rows  # each row's cosines with the others
    return _LOSS_COPIES * 4 * workload.rows * width


def _batch_bytes(manifest: Manifest, role: str, workload: Workload) -> int:
    """What a batch of the caller's inputs holds."""
    values = model_inputs(manifest, manifest.graphs[role].inputs).values()
    sizes = {"batch": workload.rows}
    return sum(
        np.dtype(spec.dtype).itemsize
        * math.prod(dim if isinstance(dim, int) else sizes.get(dim, workload.seq_len) for dim in spec.shape)
        for spec in values
    )
