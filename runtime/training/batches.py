"""The batches of one optimizer step: a function of the seed and the step, in parts that fit the memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..tasks import Example, Task
from ..tasks.examples import Array
from .options import TrainingOptions
from .sampling import Indices, batch_indices


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of a step, made anew whenever they are iterated over, so that one is held at a time.

    Attributes:
        task: makes batches of the examples.
        examples: what to train on.
        parts: indices of the examples of each micro-batch.
    """

    task: Task
    examples: Sequence[Example]
    parts: tuple[Indices, ...]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for part in self.parts:
            yield self.task.batch([self.examples[index] for index in part], training=True)


def step_batches(
    task: Task,
    examples: Sequence[Example],
    options: TrainingOptions,
    step: int,
    classes: Indices | None = None,
) -> StepBatches:
    """The batch of `records_per_step` records of a step (from 0), in micro-batches of `batch_size`.

    A last part of fewer records than the task learns from at once is left out. `classes` are those of the
    examples, if they have any.
    """
    indices = batch_indices(
        len(examples), options.records_per_step, options.seed, step, task.minimum_batch, classes
    )
    size = options.batch_size
    parts = (indices[start : start + size] for start in range(0, len(indices), size))
    return StepBatches(task, examples, tuple(part for part in parts if len(part) >= task.minimum_batch))
