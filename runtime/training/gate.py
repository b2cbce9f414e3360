"""Judging an adapter on held-out records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.generation import empty_cache
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.tasks import Example, Task

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the counted items, and the share of correct ones where the task has such a thing."""

    loss: float
    accuracy: float | None

    def is_no_worse_than(self, other: "Evaluation") -> bool:
        """Whether the loss is a number and not above the other's."""
        return self.loss <= other.loss


def evaluate(
    bundle: Bundle,
    task: Task,
    inputs: Mapping[str, FloatArray],
    examples: Sequence[Example],
    batch_size: int,
    threads: int = 0,
) -> Evaluation:
    """Run the inference and loss graphs over examples; their sessions are open only meanwhile.

    Args:
        bundle: the bundle.
        task: its task.
        inputs: the adapter's graph inputs.
        examples: encoded with their labels.
        batch_size: examples a run.
        threads: threads of the inference session.
    """
    inference = GraphSession(bundle, "inference", threads)
    loss_graph = GraphSession(bundle, "loss", threads=1)
    total, items, correct = 0.0, 0, 0
    graded = True
    try:
        inference.bind(inputs)
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            if len(chunk) < task.minimum_batch:
                continue
            batch = task.batch(chunk, training=True)
            count = task.items(batch)
            inference.bind({name: value for name, value in batch.items() if name in inference.inputs})
            inference.bind(empty_cache(inference, len(next(iter(batch.values())))))
            outputs = inference.run_for([task.output])
            loss_graph.bind_values(outputs)
            loss_graph.bind({name: value for name, value in batch.items() if name in loss_graph.inputs})
            total += count * float(loss_graph.run_for(["loss"])["loss"].numpy())
            items += count
            right = task.correct({name: value.numpy() for name, value in outputs.items()}, batch)
            graded = graded and right is not None
            correct += right or 0
    finally:
        inference.close()
        loss_graph.close()
    return Evaluation(loss=total / items, accuracy=correct / items if graded else None)
