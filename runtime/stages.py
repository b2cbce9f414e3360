"""Sessions of graphs that run one after the other as stages of a chain, and see their weights as inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.wiring import Stage

from .memory.weights import Weights, bound_weights
from .session import GraphSession

Array = npt.NDArray[np.generic]
# onnxruntime has no types: an array, or an OrtValue of another run.
Value: TypeAlias = Any
Values: TypeAlias = dict[str, Any]


class Stages:
    """Sessions by role; equal stages share theirs, and all share an arena.

    Args:
        bundle: the bundle.
        weights: where the weights come from that are bound.
        threads: threads of a session; 0 lets onnxruntime choose.
        profile: how the files of the sessions' profiles begin; none where empty.
    """

    def __init__(self, bundle: Bundle, weights: Weights, threads: int = 0, profile: str = "") -> None:
        self.weights = weights
        self._bundle, self._threads, self._profile = bundle, threads, profile
        self._sessions: dict[str, GraphSession] = {}

    def session(self, role: str) -> GraphSession:
        """The open session of a graph."""
        if role not in self._sessions:
            profile = self._profile and f"{self._profile}-{role}"
            self._sessions[role] = GraphSession(
                self._bundle, role, self._threads, shared_arena=True, profile=profile
            )
        return self._sessions[role]

    def context(self, role: str | None, weights: Mapping[str, str], given: Mapping[str, Value]) -> Values:
        """What is given, and what the stages share, which the graph `role` makes of it, if there is one.

        Args:
            role: the graph's key in the manifest; None where nothing is shared.
            weights: the keys of its weights, by the names of its inputs.
            given: the batch, and whatever else the stages read.
        """
        if role is None:
            return dict(given)
        session = self.session(role)
        _bind(session, given)
        session.bind(bound_weights(self.weights, session.inputs, weights, {}, given))
        made = session.run_for(list(session.outputs))
        self.done(session)
        return {**given, **made}

    def bound(
        self,
        role: str,
        stage: Stage,
        adapter: Mapping[str, Array],
        context: Mapping[str, Value],
        values: Mapping[str, Value],
    ) -> GraphSession:
        """The session of a stage's graph with its weights, its part of the adapter, and what it reads bound.

        Args:
            role: the graph's key in the manifest: one of the stage's.
            stage: says what the graph's inputs are called elsewhere.
            adapter: all adapter inputs by name.
            context: see `context`.
            values: others by the names of the graph's inputs; those that it has not are left.
        """
        session = self.session(role)
        session.bind(bound_weights(self.weights, session.inputs, stage.weights, stage.lookups, context))
        _bind(session, {name: adapter[key] for name, key in stage.adapter.items()})
        _bind(session, {name: context[key] for name, key in stage.context.items()})
        _bind(session, values)
        return session

    def done(self, session: GraphSession) -> None:
        """Let go of what a run was given."""
        session.unbind()
        self.weights.release()

    def end_profiles(self) -> dict[str, Path]:
        """The profile of every graph that ran, by role."""
        return {role: session.end_profile() for role, session in self._sessions.items()}

    def close(self) -> None:
        """Free the sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def _bind(session: GraphSession, values: Mapping[str, Value]) -> None:
    """Those values that the graph takes: arrays, and outputs of other runs."""
    taken = {name: value for name, value in values.items() if name in session.inputs}
    session.bind_values({name: value for name, value in taken.items() if isinstance(value, ort.OrtValue)})
    session.bind({name: value for name, value in taken.items() if not isinstance(value, ort.OrtValue)})
