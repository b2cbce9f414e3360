"""How a batch or a text is run inside the budget: the whole graph where it fits, else its stages."""

import bisect
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.wiring import StreamedInference
from edgepeft.errors import BudgetError
from edgepeft.sizes import format_size

from ..key_value_cache import cache_bytes, cache_specs, growing_cache_bytes
from .chain_cost import most_mapped_row_bytes
from .plan import suggested_budget
from .planner import check_run, run_bytes

RESIDENT, STREAMED = "inference", "streamed"
#: What batch after batch leaves in a process beside its arena: on MiniLM 2 MiB were counted over the plan.
_SPARE_BYTES = 3 * 2**20
#: Tokens of a prompt that the decoder graph reads at a time: enough for full speed, and its memory bounded.
CHUNK = 512


@dataclass(frozen=True)
class RunPlan:
    """How something is run, and its predicted peak by what it is made of.

    Attributes:
        role: the graph that is opened whole, or `STREAMED`.
        process_bytes: what the process holds without it.
        session_bytes: what opening it adds; of a chain also the weights that are mapped at once.
        activation_bytes: tensors of a run.
        cache_bytes: key/value caches; the first row's is among the activations of a resident graph.
        chunk: tokens of a prompt that are read at a time; 0 for all of them.
        is_whole: a run leaves nothing behind, so that the next one may have all of its memory.
    """

    role: str
    process_bytes: int
    session_bytes: int
    activation_bytes: int
    cache_bytes: int = 0
    chunk: int = 0
    is_whole: bool = False

    @property
    def peak_bytes(self) -> int:
        """Peak of the process."""
        return self.process_bytes + self.session_bytes + self.activation_bytes + self.cache_bytes


def plan_graph(
    role: str,
    memory: MemoryFormula,
    budget_bytes: int | None,
    process_bytes: int,
    *,
    shape: tuple[int, int],
    rank: int,
) -> RunPlan:
    """One graph, opened whole, on a batch of this shape.

    Raises:
        BudgetError: the budget cannot hold it.
    """
    if budget_bytes is not None:
        check_run(memory, budget_bytes, process_bytes, shape=shape, rank=rank)
    activation_bytes = run_bytes(memory.arena_bytes(*shape, rank))
    return RunPlan(role, process_bytes, memory.session_bytes, activation_bytes)


def plan_forward(
    manifest: Manifest, budget_bytes: int | None, process_bytes: int, *, shape: tuple[int, int], rank: int
) -> RunPlan:
    """A forward pass over a batch: the inference graph, or its stages where the budget cannot hold it.

    Args:
        manifest: the bundle's manifest.
        budget_bytes: limit on the process's resident memory; None for no limit.
        process_bytes: what it holds without sessions.
        shape: rows and tokens of the batch.
        rank: the largest rank of the adapter.

    Raises:
        BudgetError: neither fits; names the smallest budget that would do.
    """
    rows, tokens = shape
    beside_bytes = _SPARE_BYTES
    if manifest.partition is not None:
        beside_bytes += most_mapped_row_bytes(manifest, manifest.partition, rows * tokens)
    resident = _resident(manifest, budget_bytes, process_bytes, shape, rank, beside_bytes)
    if resident is not None:
        activation_bytes = resident.activation_bytes + beside_bytes
        return dataclasses.replace(resident, activation_bytes=activation_bytes, is_whole=True)
    streamed = manifest.streamed_inference
    assert streamed is not None
    assert budget_bytes is not None
    output_bytes = 0 if streamed.output_layer is None else 4 * rows * tokens * streamed.output_layer.rows
    activation_bytes = run_bytes(streamed.memory.arena_bytes(rows, tokens, rank)) + output_bytes
    plan = RunPlan(STREAMED, process_bytes, streamed.memory.session_bytes, activation_bytes, is_whole=True)
    if plan.peak_bytes > budget_bytes:
        raise _refusal(
            plan, budget_bytes, f"{rows} rows of {tokens} tokens need", "smaller batches or shorter texts"
        )
    return plan


def plan_generation(
    manifest: Manifest,
    budget_bytes: int | None,
    process_bytes: int,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    rank: int,
    rows: int = 1,
    int8: bool = False,
) -> RunPlan:
    """Texts continued: the decoder graph (or the inference graph where there is none), or stages, with as
    large chunks of the prompt as fit.

    Args:
        manifest: a decoder's manifest.
        budget_bytes: limit on the process's resident memory; None for no limit.
        process_bytes: what it holds without sessions.
        prompt_tokens: tokens of the longest prompt.
        max_new_tokens: tokens that may be written.
        rank: the largest rank of the adapter.
        rows: texts at once, each with a cache of its own.
        int8: run the decoder graph that rounds activations to 8 bits.

    Raises:
        BudgetError: neither fits; names the smallest budget that would do, and how many tokens fit.
    """
    total = prompt_tokens + max_new_tokens
    sizes = rows, prompt_tokens, total
    in_place = _in_place(manifest, budget_bytes, process_bytes, rank, sizes, int8=int8)
    if in_place is not None:
        return in_place
    others_bytes = growing_cache_bytes(manifest, rows - 1, total)
    resident = _resident(manifest, budget_bytes, process_bytes, (1, total), rank, others_bytes)
    if resident is not None:
        return dataclasses.replace(resident, cache_bytes=others_bytes)
    streamed = manifest.streamed_inference
    assert streamed is not None
    assert budget_bytes is not None

    def plan(chunk: int, prompt_tokens: int, total: int) -> RunPlan:
        return _generation(manifest, streamed, process_bytes, rank, (rows, chunk, prompt_tokens, total))

    chunk = _largest(prompt_tokens, lambda n: plan(n, prompt_tokens, total).peak_bytes <= budget_bytes)
    if chunk:
        return plan(chunk, prompt_tokens, total)
    remedy = "a shorter prompt or a lower --max-new-tokens" + (", or fewer prompts" if rows > 1 else "")
    fitting = _largest(total, lambda n: plan(1, n, n).peak_bytes <= budget_bytes)
    if fitting > 1:
        remedy += f" ({fitting} tokens fit, prompt and answer together)"
    of_rows = f"{rows} prompts of " if rows > 1 else ""
    what = f"{of_rows}{prompt_tokens} tokens and {max_new_tokens} more need"
    raise _refusal(plan(1, prompt_tokens, total), budget_bytes, what, remedy)


def _in_place(
    manifest: Manifest,
    budget_bytes: int | None,
    process_bytes: int,
    rank: int,
    sizes: tuple[int, int, int],
    *,
    int8: bool,
) -> RunPlan | None:
    """The decoder graph with as large chunks of the prompt as fit, for these rows, prompt and whole length;
    the plain one where there is no adapter; None where there is neither or the budget cannot hold it."""
    decoder = manifest.decoder
    if decoder is None:
        return None
    adapted, plain = decoder.pairs[int8]
    role = adapted if rank else plain  # which takes what has no rank
    memory = decoder.int8_memory if int8 else decoder.memory
    if role is None or memory is None:
        return None
    rows, prompt_tokens, total = sizes
    kept_bytes = growing_cache_bytes(manifest, rows, total)

    def plan(chunk: int) -> RunPlan:
        arena_bytes = max(memory.arena_bytes(1, chunk, rank), memory.arena_bytes(rows, 1, rank))
        session_bytes = memory.session_bytes
        return RunPlan(role, process_bytes, session_bytes, run_bytes(arena_bytes), kept_bytes, chunk)

    chunk = min(prompt_tokens, CHUNK)
    if budget_bytes is not None:
        chunk = _largest(chunk, lambda n: plan(n).peak_bytes <= budget_bytes)
    return plan(chunk) if chunk else None


def _resident(
    manifest: Manifest,
    budget_bytes: int | None,
    process_bytes: int,
    shape: tuple[int, int],
    rank: int,
    beside_bytes: int,
) -> RunPlan | None:
    """The whole inference graph, where something else has room beside it; None where only its stages may
    fit."""
    memory = manifest.inference_memory
    held_bytes = process_bytes + beside_bytes
    try:
        plan = plan_graph(RESIDENT, memory, budget_bytes, held_bytes, shape=shape, rank=rank)
        return dataclasses.replace(plan, process_bytes=process_bytes)
    except BudgetError as error:
        if manifest.streamed_inference is not None:
            return None
        raise BudgetError(
            f"{error} (the bundle's inference graph is in one piece, so its weights cannot be streamed)",
            budget_bytes=error.budget_bytes,
            required_bytes=error.required_bytes,
        ) from error


def _generation(
    manifest: Manifest,
    streamed: StreamedInference,
    process_bytes: int,
    rank: int,
    sizes: tuple[int, int, int, int],
) -> RunPlan:
    """Streamed generation with these rows, chunk, prompt and whole length."""
    rows, chunk, prompt_tokens, total = sizes
    memory = streamed.memory
    if cache_specs(manifest):
        arena_bytes = max(
            memory.arena_bytes(1, chunk, rank, prompt_tokens - chunk),
            memory.arena_bytes(1, 1, rank, total - 1),
        )
    else:  # every token reads the whole text again
        arena_bytes = memory.arena_bytes(1, total, rank)
    kept_bytes = rows * cache_bytes(manifest, streamed, 1, total)
    return RunPlan(STREAMED, process_bytes, memory.session_bytes, run_bytes(arena_bytes), kept_bytes, chunk)


def _largest(count: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1, …, count that fits, 0 where none does; what is larger than one that does not fit does
    not fit either."""
    return bisect.bisect_left(range(1, count + 1), True, key=lambda n: not fits(n))


def _refusal(plan: RunPlan, budget_bytes: int, what: str, remedy: str) -> BudgetError:
    required_bytes = suggested_budget(plan.peak_bytes)
    return BudgetError(
        f"{what} {format_size(plan.peak_bytes)} with weights streamed (process "
        f"{format_size(plan.process_bytes)}, sessions {format_size(plan.session_bytes)}, activations "
        f"{format_size(plan.activation_bytes)}, key/value cache {format_size(plan.cache_bytes)}), the budget "
        f"is {format_size(budget_bytes)}: give at least {required_bytes // 2**20}MiB, or {remedy}",
        budget_bytes=budget_bytes,
        required_bytes=required_bytes,
    )
