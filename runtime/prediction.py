"""Running a task over many examples: in batches of similar lengths that the memory budget can hold."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.errors import BudgetError, BundleError, EdgePeftError

from .adapters.loaded import AdapterSpecs, part_of
from .records import Record, RecordSource
from .tasks import Example, Task
from .tasks.examples import Array, Outputs

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
        BundleError: the graph's output is not what the task makes results of.
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
        _check_output(task, outputs[task.output], len(next(iter(batch.values()))))
        yield indices, batch, outputs


def _check_output(task: Task, values: npt.NDArray[np.generic], rows: int) -> None:
    """Look at what a graph gave, which says of its output's shape what its maker likes.

    Raises:
        BundleError: the task makes no results of it.
    """
    spec = next(item for item in task.manifest.graphs["inference"].outputs if item.name == task.output)
    width = spec.shape[-1] if task.targets is None else len(task.targets.names)
    if (
        values.dtype.kind != "f"
        or values.ndim != len(spec.shape)
        or len(values) != rows
        or (isinstance(width, int) and values.shape[-1] != width)
    ):
        raise BundleError(
            f"graph 'inference': its output {task.output!r} is {list(values.shape)} of {values.dtype}, "
            f"expected {[rows, *spec.shape[1:-1], width]} of floats: export the model again"
        )


def _check_finite(result: object, what: str) -> None:
    """Refuse to give out what is no number.

    Raises:
        EdgePeftError: some of it is not.
    """
    if isinstance(result, Mapping):
        for item in result.values():
            _check_finite(item, what)
    elif isinstance(result, list):
        for item in result:
            _check_finite(item, what)
    elif isinstance(result, float | np.ndarray) and not np.isfinite(result).all():
        raise EdgePeftError(
            f"the model's results for {what} are no finite numbers: its weights are damaged, or the adapter "
            "does not belong to it"
        )


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
            _check_finite(result, f"record {index + 1}")
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
        _check_finite(outputs[task.output], "a batch")
        found[indices] = outputs[task.output]
    return found
