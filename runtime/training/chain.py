"""The training graph as a chain of stages that run one at a time, their weights mapped from the bundle."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.manifest import Partition, Stage
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError
from edgepeft.runtime.memory.weights import MappedWeights
from edgepeft.runtime.session import GraphSession
from edgepeft.runtime.training.buffers import TrainingState
from edgepeft.runtime.training.heads import SlicedHead

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
# onnxruntime has no types: an array, or an OrtValue of another run.
Value: TypeAlias = Any


class Chain:
    """The stages of a bundle with an adapter bound.

    A forward pass keeps what goes from stage to stage and nothing else; a backward pass computes each stage
    anew. Equal stages share a session, which sees their weights as inputs.

    Args:
        bundle: the bundle.
        inputs: all adapter inputs by name; read at every run.
        threads: threads of a session; 0 lets onnxruntime choose.
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
        partition: Partition | None = None,
        profile: str = "",
    ) -> None:
        partition = partition or bundle.manifest.partition
        if partition is None:
            raise UsageError(f"{bundle.path}: was exported without stages: export it again")
        self._bundle, self._threads, self._profile = bundle, threads, profile
        self._partition = partition
        self._inputs = inputs
        self._weights = MappedWeights(bundle)
        self._sessions: dict[str, GraphSession] = {}
        self._stages = partition.stages_and_head
        uses = Counter(name for stage in self._stages for name in stage.adapter.values())
        self._shared = {name for name, count in uses.items() if count > 1}
        sliced = partition.vocabulary_head
        self._sliced = None if sliced is None else SlicedHead(sliced, self, self._weights)

    def evaluate(self, batch: Mapping[str, Array]) -> dict[str, npt.NDArray[np.float32]]:
        """`loss`, and the task's output where the head has it whole."""
        context = self._context(batch)
        hidden: ort.OrtValue | None = None
        for stage in self._partition.stages:
            hidden = self._run_forward(stage, context, hidden)
        if self._sliced is not None:
            assert hidden is not None
            loss, _ = self._sliced.loss(hidden, batch["labels"])
            return {"loss": np.array(loss, np.float32)}
        session = self._bound(self._stages[-1].forward, self._stages[-1], context, hidden)
        outputs = session.run_for(list(session.outputs))
        self._weights.release()
        return {name: value.numpy() for name, value in outputs.items()}

    def gradients(self, batch: Mapping[str, Array], state: TrainingState) -> float:
        """The batch's loss; the gradients of the state's tensors land in the state.

        The backward pass ends at the first stage that has a trained tensor.
        """
        context = self._context(batch)
        hidden = self._forward(context)
        for name in self._shared & state.gradients.keys():
            state.gradients[name][...] = 0
        loss, cotangent = 0.0, None
        if self._sliced is not None:
            last = hidden.pop()
            assert last is not None
            loss, kept = self._sliced.loss(last, batch["labels"])
            cotangent = self._sliced.cotangent(last, batch["labels"], kept)
            del last
        trained = [
            {name: key for name, key in stage.adapter.items() if key in state.gradients}
            for stage in self._stages
        ]
        lowest = next(index for index, names in enumerate(trained) if names)
        for index in range(len(self._stages) - 1, lowest - 1, -1):
            stage = self._stages[index]
            assert stage.backward is not None
            session = self._bound(stage.backward, stage, context, hidden.pop())
            if cotangent is not None:
                session.bind_values({"cotangent": cotangent})
            into: dict[str, FloatArray] = {}
            added: dict[str, FloatArray] = {}
            for name, key in trained[index].items():
                (added if key in self._shared else into)[f"grad.{name}"] = state.gradients[key]
            wanted = [name for name in ("loss", "hidden.cotangent") if name in session.outputs]
            results = session.run_into(into, [*wanted, *added])
            for name, total in added.items():
                total += results[name].numpy()
            if "loss" in results:
                loss = float(results["loss"].numpy())
            cotangent = results.get("hidden.cotangent")
            self._weights.release()
        return loss

    def session(self, role: str) -> GraphSession:
        """The open session of a graph."""
        if role not in self._sessions:
            profile = self._profile and f"{self._profile}-{role}"
            self._sessions[role] = GraphSession(
                self._bundle, role, self._threads, shared_arena=True, profile=profile
            )
        return self._sessions[role]

    def end_profiles(self) -> dict[str, Path]:
        """The profile of every graph that ran, by role."""
        return {role: session.end_profile() for role, session in self._sessions.items()}

    def close(self) -> None:
        """Free the sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _forward(self, context: Mapping[str, Value]) -> list[ort.OrtValue | None]:
        """What goes into each stage and, where the head is sliced, into the head; nothing into the first."""
        hidden: list[ort.OrtValue | None] = [None]
        for stage in self._partition.stages:
            hidden.append(self._run_forward(stage, context, hidden[-1]))
        return hidden

    def _run_forward(
        self, stage: Stage, context: Mapping[str, Value], hidden: ort.OrtValue | None
    ) -> ort.OrtValue:
        """What a stage hands on."""
        session = self._bound(stage.forward, stage, context, hidden)
        out = session.run_for(["hidden.out"])["hidden.out"]
        self._weights.release()
        return out

    def _context(self, batch: Mapping[str, Array]) -> dict[str, Value]:
        """The batch, and what the stages share."""
        context: dict[str, Value] = dict(batch)
        if self._partition.context is not None:
            session = self.session(self._partition.context)
            session.bind({name: batch[name] for name in session.inputs if name in batch})
            session.bind(self._views(session, self._partition.context_weights))
            context |= session.run_for(list(session.outputs))
        return context

    def _bound(
        self, role: str, stage: Stage, context: Mapping[str, Value], hidden: ort.OrtValue | None
    ) -> GraphSession:
        """The session of a stage's graph with everything bound but a cotangent."""
        session = self.session(role)
        session.bind(self._views(session, stage.weights))
        session.bind(
            {name: self._inputs[key] for name, key in stage.adapter.items() if name in session.inputs}
        )
        shared = {name: context[key] for name, key in stage.context.items() if name in session.inputs}
        # The head takes labels, or whatever else its loss is made of, under their own names.
        shared |= {name: context[name] for name in session.inputs if name in context}
        if hidden is not None and "hidden" in session.inputs:
            shared["hidden"] = hidden
        for name, value in shared.items():
            if isinstance(value, ort.OrtValue):
                session.bind_values({name: value})
            else:
                session.bind({name: value})
        return session

    def _views(self, session: GraphSession, weights: Mapping[str, str]) -> dict[str, Array]:
        return {
            name: self._weights.view(key, session.inputs[name])
            for name, key in weights.items()
            if name in session.inputs
        }
