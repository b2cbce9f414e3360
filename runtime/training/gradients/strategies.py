"""Where gradients come from: one resident graph, or a chain of stages."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Strategy
from edgepeft.bundle.reader import Bundle

from ...memory.plan import NOTHING_HELD, Held
from ...session import GraphSession
from ..state.buffers import TrainingState
from .chain import Chain, Take

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]


class Gradients(Protocol):
    """Computes the loss of a batch; the gradients land in the state that it was made with."""

    def run(self, batch: Mapping[str, Array]) -> float:
        """The batch's loss."""

    def close(self) -> None:
        """Free the sessions."""


def open_gradients(
    bundle: Bundle,
    strategy: Strategy,
    constants: Mapping[str, FloatArray],
    state: TrainingState,
    threads: int = 0,
    held: Held = NOTHING_HELD,
    take: Take | None = None,
) -> Gradients:
    """What computes gradients in the way of `strategy`.

    Args:
        bundle: the bundle.
        strategy: one of its manifest's.
        constants: all adapter inputs; those in `state` are taken from there.
        state: the trained tensors.
        threads: threads of a session.
        held: what a chain holds to save time.
        take: takes gradients out of the state as a chain completes them (see `Chain.gradients`).
    """
    if strategy.graph is None:
        return ChainGradients(bundle, constants, state, threads, held, take)
    return GradientSession(bundle, strategy.graph, constants, state, threads)


class GradientSession:
    """A training graph with everything bound: parameters are read and gradients written in place.

    Args:
        bundle: the bundle.
        role: the graph's key in the manifest.
        constants: adapter inputs that do not train.
        state: the trained tensors.
        threads: threads of the session.
    """

    def __init__(
        self,
        bundle: Bundle,
        role: str,
        constants: Mapping[str, FloatArray],
        state: TrainingState,
        threads: int = 0,
    ) -> None:
        self._loss = np.zeros((), np.float32)
        self._session = GraphSession(bundle, role, threads, shared_arena=True)
        self._session.bind({name: value for name, value in constants.items() if name not in state.parameters})
        self._session.bind(state.parameters)
        self._session.bind_outputs({"loss": self._loss})
        self._session.bind_outputs({f"grad.{name}": value for name, value in state.gradients.items()})

    def run(self, batch: Mapping[str, npt.NDArray[np.generic]]) -> float:
        """Compute the batch's loss and its gradients, which land in the state."""
        self._session.bind({name: value for name, value in batch.items() if name in self._session.inputs})
        self._session.run()
        self._session.drop_mapped_pages()  # rows of an embedding, or in time all of it is in the process
        return float(self._loss)

    def close(self) -> None:
        """Free the session."""
        self._session.close()


class ChainGradients:
    """A chain of stages and the state that its gradients land in."""

    def __init__(
        self,
        bundle: Bundle,
        constants: Mapping[str, FloatArray],
        state: TrainingState,
        threads: int,
        held: Held,
        take: Take | None,
    ) -> None:
        self._state, self._take = state, take
        self._chain = Chain(bundle, state.inputs(constants), threads, held=held)

    def run(self, batch: Mapping[str, Array]) -> float:
        """Compute the batch's loss and its gradients, which land in the state."""
        return self._chain.gradients(batch, self._state, self._take)

    def close(self) -> None:
        """Free the sessions."""
        self._chain.close()
