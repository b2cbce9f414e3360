"""The training graph as a chain of stages that run one at a time, their weights mapped from the bundle."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.wiring import Partition, Stage
from edgepeft.errors import UsageError

from ...memory.chain_cost import largest_stage_bytes
from ...memory.plan import NOTHING_HELD, Held
from ...memory.read_weights import ReadWeights
from ...memory.weights import MappedWeights, Weights
from ...session import GraphSession
from ...stages import Stages, Value, Values
from ..state.buffers import TrainingState
from .sliced_head import SlicedHead

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
Take: TypeAlias = Callable[[Collection[str]], None]


class Chain:
    """The stages of a bundle with an adapter bound.

    A forward pass holds what goes from stage to stage, and of the last `held.stages` stages what their
    backward pass needs; the backward pass computes that of the others anew. Equal stages share their
    sessions, which see their weights as inputs.

    Args:
        bundle: the bundle.
        inputs: all adapter inputs by name; read at every run.
        threads: threads of a session; 0 lets onnxruntime choose.
        held: what is held beside what must be.
        partition: the stages to run; the bundle's own where None.
        profile: how the files of the sessions' profiles begin; none where empty.

    Raises:
        UsageError: the bundle has no stages.
    """

    def __init__(
        self,
        bundle: Bundle,
        inputs: Mapping[str, Array],
        threads: int = 0,
        *,
        held: Held = NOTHING_HELD,
        partition: Partition | None = None,
        profile: str = "",
    ) -> None:
        partition = partition or bundle.manifest.partition
        if partition is None:
            raise UsageError(f"{bundle.path}: was exported without stages: export it again")
        self._partition = partition
        self._inputs = inputs
        self._held = held
        weights: Weights
        if held.cached:
            weights = MappedWeights(bundle, stays=held.weights)
        else:  # a stage's, and the next one's
            weights = ReadWeights(bundle, 2 * largest_stage_bytes(bundle.manifest, partition))
        self._run = Stages(bundle, weights, threads, profile)
        self._stages = partition.stages_and_head
        sliced = partition.vocabulary_head
        self._sliced = None if sliced is None else SlicedHead(sliced, self._run)

    def evaluate(self, batch: Mapping[str, Array]) -> dict[str, npt.NDArray[np.float32]]:
        """`loss`, and the task's output where the head has it whole."""
        context = self._context(batch)
        hidden: ort.OrtValue | None = None
        for stage in self._partition.stages:
            hidden = self._forward(stage, context, hidden)[0]
        if self._sliced is not None:
            assert hidden is not None
            return {"loss": np.array(self._sliced.loss(hidden, batch["labels"]), np.float32)}
        session = self._bound(self._stages[-1].forward, self._stages[-1], context, hidden)
        outputs = session.run_for(list(session.outputs))
        self._run.done(session)
        return {name: value.numpy() for name, value in outputs.items()}

    def gradients(self, batch: Mapping[str, Array], state: TrainingState, take: Take | None = None) -> float:
        """The batch's loss; the gradients of the state's tensors land in the state.

        The backward pass ends at the first stage that has a trained tensor; below it nothing is held.

        Args:
            batch: every model input, and labels.
            state: receives the gradients.
            take: called after a stage with the names of tensors whose gradients are complete then and which
                no stage has still to read.
        """
        context = self._context(batch)
        trained = [
            {name: key for name, key in stage.adapter.items() if key in state.gradients}
            for stage in self._stages
        ]
        lowest = next(index for index, names in enumerate(trained) if names)
        complete = _first_uses(trained)
        count = len(self._partition.stages)
        entering: dict[int, ort.OrtValue | None] = {}
        stride = self._held.stride
        kept: dict[int, Values] = {}
        hidden: ort.OrtValue | None = None
        for index, stage in enumerate(self._partition.stages):
            self._prefetch(index + 1)
            if index >= lowest and (index - lowest) % stride == 0:
                entering[index] = hidden
            hidden, values = self._forward(stage, context, hidden)
            if index >= max(lowest, count - self._held.stages):
                kept[index] = values
            del values
        found: set[str] = set()  # what several stages share has a gradient from each
        loss, cotangent = 0.0, None
        if self._sliced is None:
            entering[count] = hidden
        else:
            assert hidden is not None
            loss, cotangent = self._sliced.loss_and_cotangent(hidden, batch["labels"])
        del hidden
        for index in range(len(self._stages) - 1, lowest - 1, -1):
            if index not in entering:
                self._enter(entering, context, index)
            stage, hidden = self._stages[index], entering.pop(index)
            self._prefetch(index - 1)
            values = kept.pop(index) if index in kept else self._kept(stage, context, hidden)
            assert stage.backward is not None
            session = self._bound(stage.backward, stage, context, hidden, values)
            if cotangent is not None:
                session.bind_values({"cotangent": cotangent})
            wanted = [name for name in ("loss", "hidden.cotangent") if name in session.outputs]
            results = session.run_for([*wanted, *(f"grad.{name}" for name in trained[index])])
            for name, key in trained[index].items():
                state.put_gradient(key, results[f"grad.{name}"].numpy(), add=key in found)
                found.add(key)
            if take is not None and complete[index]:
                take(complete[index])
            if "loss" in results:
                loss = float(results["loss"].numpy())
            cotangent = results.get("hidden.cotangent")
            del hidden, values, results
            self._run.done(session)
        return loss

    def end_profiles(self) -> dict[str, Path]:
        """The profile of every graph that ran, by role."""
        return self._run.end_profiles()

    def close(self) -> None:
        """Free the sessions."""
        self._run.close()

    def _forward(
        self, stage: Stage, context: Mapping[str, Value], hidden: ort.OrtValue | None
    ) -> tuple[ort.OrtValue, Values]:
        """What a stage hands on, and what its backward pass needs."""
        session = self._bound(stage.forward, stage, context, hidden)
        values = session.run_for(list(session.outputs))
        self._run.done(session)
        if stage.output is None:
            return values["hidden.out"], {}
        session = self._bound(stage.output, stage, context, hidden, values)
        out = session.run_for(["hidden.out"])["hidden.out"]
        self._run.done(session)
        return out, values

    def _enter(
        self, entering: dict[int, ort.OrtValue | None], context: Mapping[str, Value], index: int
    ) -> None:
        """Compute anew what enters the stages up to `index`, from the last one of which it was kept."""
        first = max(entering)
        for later in range(first, index):
            entering[later + 1] = self._forward(self._stages[later], context, entering[later])[0]

    def _kept(self, stage: Stage, context: Mapping[str, Value], hidden: ort.OrtValue | None) -> Values:
        """What a stage's backward pass needs, computed anew."""
        if stage.output is None:
            return {}
        session = self._bound(stage.forward, stage, context, hidden)
        values = session.run_for(list(session.outputs))
        self._run.done(session)
        return values

    def _prefetch(self, index: int) -> None:
        """Have the weights that a stage reads whole read, if there is such a stage."""
        if 0 <= index < len(self._stages):
            stage = self._stages[index]
            self._run.weights.prefetch(
                key for name, key in stage.weights.items() if name not in stage.lookups
            )

    def _context(self, batch: Mapping[str, Array]) -> Values:
        """The batch, and what the stages share."""
        return self._run.context(self._partition.context, self._partition.context_weights, batch)

    def _bound(
        self,
        role: str,
        stage: Stage,
        context: Mapping[str, Value],
        hidden: ort.OrtValue | None,
        kept: Values | None = None,
    ) -> GraphSession:
        """The session of a stage's graph with everything bound but a cotangent."""
        # The head takes labels, or whatever else its loss is made of, under their own names.
        values = {**context, **(kept or {})}
        if hidden is not None:
            values["hidden"] = hidden
        return self._run.bound(role, stage, self._inputs, context, values)


def _first_uses(trained: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Of each stage, the tensors that it is the first to read, and so the last to have a gradient for."""
    seen: set[str] = set()
    first = []
    for names in trained:
        first.append([key for key in dict.fromkeys(names.values()) if key not in seen])
        seen.update(names.values())
    return first
