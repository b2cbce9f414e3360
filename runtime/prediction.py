"""Running a task over many examples: in batches of similar lengths that the memory budget can hold."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.errors import BudgetError
from edgepeft.runtime.data import Record, RecordSource
from edgepeft.runtime.registry import AdapterSpecs, part_of
from edgepeft.runtime.tasks import Example, Task
from edgepeft.runtime.tasks.base import Array, Outputs

Forward = Callable[[Mapping[str, object], AdapterSpecs], dict[str, npt.NDArray[np.float32]]]
OnProgress = Callable[[int, int], None]
"""Is told how many records of how many are done; where only the end tells how many there are, of how many
that were read."""

WINDOW_BYTES = 2**20
"""Encoded records that wait for their results take so much together, or are those of one batch."""


def as_records(task: Task, source: RecordSource | Sequence[object]) -> RecordSource:
    """Records as they are; texts, and what else a task reads by itself, as records of it."""
    if isinstance(source, str) or not isinstance(source, Sequence):
        return source
    return [item if isinstance(item, Mapping) else {task.field: item} for item in source]


def windows(
    task: Task, records: Iterable[Record], max_length: int, batch_size: int
) -> Iterator[list[Example]]:
    """The records encoded, in their order, as many at a time as `WINDOW_BYTES` hold; whole batches of them.

    Raises:
        DataError: a record cannot be used.
    """
    window: list[Example] = []
    nbytes = 0
    for record in records:
        example = task.encode_record(record, max_length, training=False)
        window.append(example)
        nbytes += example.held_bytes
        if nbytes > WINDOW_BYTES and len(window) % batch_size == 0:
            yield window
            window, nbytes = [], 0
    if window:
        yield window


def batches(
    task: Task, forward: Forward, examples: Sequence[Example], adapter: AdapterSpecs, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Array], Outputs]]:
    """Run all examples, the longest first: what does not fit shows at once, and padding is short.

    A batch that the budget cannot hold is halved until it can.

    Args:
        task: the bundle's task.
        forward: runs a batch; refuses before the work what it cannot hold.
        examples: the encoded records.
        adapter: for all of them, or one for each.
        batch_size: examples a batch at most.

    Yields:
        The examples' numbers, their batch and its outputs.

    Raises:
        BudgetError: the budget cannot hold a single example.
    """
    order = sorted(range(len(examples)), key=lambda index: -examples[index].length)
    waiting = [order[start : start + batch_size] for start in range(0, len(order), batch_size)][::-1]
    while waiting:
        indices = waiting.pop()
        batch = task.batch([examples[index] for index in indices], training=False)
        try:
            outputs = forward(batch, part_of(adapter, indices))
        except BudgetError:
            if len(indices) == 1:
                raise
            middle = len(indices) // 2
            waiting += [indices[middle:], indices[:middle]]
            continue
        yield indices, batch, outputs


def results(
    task: Task,
    forward: Forward,
    examples: Sequence[Example],
    adapter: AdapterSpecs,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """What the task says of each example, in their order; see `batches`. `on_batch` is told how many are
    done."""
    found: dict[int, dict[str, Any]] = {}
    for indices, batch, outputs in batches(task, forward, examples, adapter, batch_size):
        for index, result in zip(indices, task.results(outputs, batch), strict=True):
            found[index] = task.finish(result, examples[index])
        if on_batch is not None:
            on_batch(len(found))
    return [found[index] for index in range(len(examples))]


def embeddings(
    task: Task, forward: Forward, examples: Sequence[Example], adapter: AdapterSpecs, batch_size: int
) -> npt.NDArray[np.float32]:
    """The sentence embedding of each example, float32 `[examples, width]`; see `batches`."""
    width = task.manifest.model.embedding_size
    assert width is not None  # checked with the manifest
    found = np.empty((len(examples), width), np.float32)
    for indices, _, outputs in batches(task, forward, examples, adapter, batch_size):
        found[indices] = outputs[task.output]
    return found
