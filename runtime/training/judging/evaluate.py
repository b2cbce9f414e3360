"""Losses of an adapter without gradients, and judging it by them on held-out records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import FEATURES, Strategy
from edgepeft.bundle.reader import Bundle

from ...inputs import nothing_dropped
from ...key_value_cache import empty_cache
from ...session import GraphSession
from ...tasks import Example, Task
from ..gradients.chain import Chain

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]

SAID_VALUES = 2**20
"""Scores that an evaluation keeps at most, with targets 12 MiB; of more it has loss and accuracy only."""


@dataclass(frozen=True)
class Scores:
    """What a classifier said of labelled items: scores and targets `[items, labels]`, see `Targets`."""

    scores: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the counted items, and the share of correct ones where the task has such a thing; of a
    classifier also what it said, if that is not too much to keep."""

    loss: float
    accuracy: float | None
    said: Scores | None = None


Sink = Callable[[Mapping[str, FloatArray], Mapping[str, Array]], None]
"""Is given what the model put out for a batch, and the batch."""


def evaluate(
    bundle: Bundle,
    task: Task,
    inputs: Mapping[str, FloatArray],
    examples: Sequence[Example],
    batch_size: int,
    strategy: Strategy,
    threads: int = 0,
    sink: Sink | None = None,
) -> Evaluation:
    """The loss and the share of correct items of examples; sessions are open only meanwhile.

    Args:
        bundle: the bundle.
        task: its task.
        inputs: the adapter's graph inputs.
        examples: encoded with their labels.
        batch_size: examples a run.
        strategy: how the adapter trains: in stages, it is judged in stages too.
        threads: threads of a session.
        sink: is given every batch.
    """
    judge = open_judge(bundle, task, inputs, strategy, threads)
    total, items, correct = 0.0, 0, 0
    graded = True
    said: list[tuple[FloatArray, npt.NDArray[np.float64]]] = []
    said_values = 0
    try:
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            if len(chunk) < task.minimum_batch:
                continue
            batch = task.batch(chunk, training=True)
            count = task.items(batch)
            loss, outputs = judge.run(batch)
            total += count * loss
            items += count
            right = task.correct(outputs, batch) if outputs else None
            graded = graded and right is not None
            correct += right or 0
            labelled = task.labelled(outputs[task.output], batch) if task.output in outputs else None
            if labelled is not None and said_values <= SAID_VALUES:
                said.append(labelled)
                said_values += labelled[0].size
            if sink is not None:
                sink(outputs, batch)
    finally:
        judge.close()
    scores = None
    if said and said_values <= SAID_VALUES:
        scores = Scores(
            np.concatenate([values for values, _ in said]).astype(np.float64),
            np.concatenate([targets for _, targets in said]),
        )
    return Evaluation(total / items, correct / items if graded else None, scores)


class Judge(Protocol):
    """Computes losses by forward passes; reads the adapter's inputs anew at every run."""

    def run(self, batch: Mapping[str, Array]) -> tuple[float, dict[str, FloatArray]]:
        """The loss of a batch, where it exists whole the task's output, and of a linear head its features."""

    def close(self) -> None:
        """Free the sessions."""


def open_judge(
    bundle: Bundle,
    task: Task,
    inputs: Mapping[str, FloatArray],
    strategy: Strategy,
    threads: int = 0,
) -> Judge:
    """What computes losses: the chain of stages where `strategy` trains without a graph of its own and the
    bundle has stages, else the inference graph.

    Args:
        bundle: the bundle.
        task: its task.
        inputs: the adapter's graph inputs.
        strategy: how the adapter trains.
        threads: threads of a session.
    """
    if strategy.graph is None and bundle.manifest.partition is not None:
        return _StagedJudge(bundle, inputs, threads)
    return _ResidentJudge(bundle, task, inputs, threads, exact_products=not strategy.exact)


class _ResidentJudge:
    """The inference graph, and the loss graph on its output."""

    def __init__(
        self,
        bundle: Bundle,
        task: Task,
        inputs: Mapping[str, FloatArray],
        threads: int,
        *,
        exact_products: bool,
    ) -> None:
        self._outputs = [task.output] if bundle.manifest.linear_head is None else [task.output, FEATURES]
        self._inference = GraphSession(
            bundle, "inference", threads, shared_arena=True, exact_products=exact_products
        )
        self._loss = GraphSession(bundle, "loss", threads=1, shared_arena=True)
        self._inference.bind(inputs)

    def run(self, batch: Mapping[str, Array]) -> tuple[float, dict[str, FloatArray]]:
        """The loss of a batch, the task's output and a linear head's features."""
        inference, loss = self._inference, self._loss
        inference.bind({name: value for name, value in batch.items() if name in inference.inputs})
        inference.bind(empty_cache(inference.inputs, len(next(iter(batch.values())))))
        outputs = inference.run_for(self._outputs)
        loss.bind_values({self._outputs[0]: outputs[self._outputs[0]]})
        loss.bind({name: value for name, value in batch.items() if name in loss.inputs})
        value = float(loss.run_for(["loss"])["loss"].numpy())
        return value, {name: output.numpy() for name, output in outputs.items()}

    def close(self) -> None:
        """Free the sessions."""
        self._inference.close()
        self._loss.close()


class _StagedJudge:
    """The chain's forward stages and its head."""

    def __init__(self, bundle: Bundle, inputs: Mapping[str, FloatArray], threads: int) -> None:
        self._chain = Chain(bundle, inputs, threads)
        self._nothing_dropped = nothing_dropped(bundle.manifest)

    def run(self, batch: Mapping[str, Array]) -> tuple[float, dict[str, FloatArray]]:
        """The loss of a batch and the task's output, where the head makes it whole."""
        outputs = self._chain.evaluate({**batch, **self._nothing_dropped})
        return float(outputs.pop("loss")), outputs

    def close(self) -> None:
        """Free the sessions."""
        self._chain.close()
