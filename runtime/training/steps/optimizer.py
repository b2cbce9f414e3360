"""AdamW and gradient clipping, driven chunk by chunk through the bundle's own graphs."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES, OptimizerState
from edgepeft.bundle.reader import Bundle

from ...memory.planner import CHUNK_VALUES
from ...session import GraphSession
from ..state.buffers import TrainingState


@dataclass(frozen=True)
class AdamWOptions:
    """Constants of AdamW; the rate comes with each step. `max_grad_norm` 0 switches clipping off."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class AdamW:
    """`torch.optim.AdamW` after `torch.nn.utils.clip_grad_norm_`, over a training state's flat buffers.

    Args:
        bundle: the bundle.
        state: the trained tensors.
        options: the constants.
        optimizer: what the state was made with.
        factors: by name, what the rate is multiplied by for a tensor; 1 where it is not named.
    """

    def __init__(
        self,
        bundle: Bundle,
        state: TrainingState,
        options: AdamWOptions,
        optimizer: OptimizerState = OPTIMIZER_STATES["32bit"],
        factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._state = state
        self._factors = factors
        self._rate = 0.0
        self._options = options
        # One thread: a chunk fits the cache, and another pool would spin against the training graph's.
        self._adamw = GraphSession(bundle, optimizer.role, threads=1)
        self._grad_norm = GraphSession(bundle, "grad_norm", threads=1)
        # What the graph reads and writes, and how many values share an entry of it.
        self._shares = {"param": 1} | {name: item.values for name, item in optimizer.buffers.items()}
        # The graph's outputs must not overwrite what it still reads, so they go through these.
        self._scratch: dict[str, npt.NDArray[np.generic]] = {
            name: np.empty(CHUNK_VALUES // values, state.buffers[name].dtype)
            for name, values in self._shares.items()
        }
        self._scalars = {
            name: np.zeros((), np.float32)
            for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "clip_coef")
        }
        for name in ("beta1", "beta2", "eps", "weight_decay"):
            self._scalars[name][...] = getattr(options, name)
        self._adamw.bind(self._scalars)
        self._taken = 0.0

    def step(self, number: int, learning_rate: float) -> float:
        """Update the parameters from the gradients.

        Args:
            number: of the step, from 1.
            learning_rate: of the step.

        Returns:
            The gradients' global L2 norm before clipping.
        """
        self.begin(number, learning_rate)
        norm = math.sqrt(self._squares(None))
        if limit := self._options.max_grad_norm:
            self._scalars["clip_coef"][...] = min(1.0, limit / (norm + 1e-6))
        self._update(None)
        return norm

    def begin(self, number: int, learning_rate: float) -> None:
        """Set the rate of a step whose gradients are not all there yet, and will not be clipped: `take` them.

        Args:
            number: of the step, from 1.
            learning_rate: of the step.
        """
        self._rate = learning_rate
        self._scalars["step"][...] = number
        self._scalars["clip_coef"][...] = 1.0
        self._taken = 0.0

    def take(self, names: Collection[str]) -> None:
        """Update some parameters from their gradients."""
        self._taken += self._squares(names)
        self._update(names)

    @property
    def clip_coef(self) -> float:
        """What the gradients of the last update were multiplied by."""
        return float(self._scalars["clip_coef"])

    @property
    def taken_norm(self) -> float:
        """The global L2 norm of the gradients that were taken since `begin`."""
        return math.sqrt(self._taken)

    def _update(self, names: Collection[str] | None) -> None:
        """Update some parameters, or all."""
        if not self._factors:
            self._update_at(self._rate, names)
            return
        by_factor: dict[float, list[str]] = {}
        for name in self._state.parameters if names is None else names:
            by_factor.setdefault(self._factors.get(name, 1.0), []).append(name)
        for factor, members in by_factor.items():
            self._update_at(factor * self._rate, members)

    def _update_at(self, rate: float, names: Collection[str] | None) -> None:
        """Update some parameters, or all, with this rate."""
        self._scalars["lr"][...] = rate
        buffers = self._state.buffers
        for start, stop in self._state.pieces(names):
            pieces = {
                name: buffers[name].read(start // values, stop // values)
                for name, values in self._shares.items()
            }
            self._adamw.bind({"grad": buffers["grad"].read(start, stop), **pieces})
            scratch = {name: self._scratch[name][: len(piece)] for name, piece in pieces.items()}
            self._adamw.bind_outputs({f"{name}_out": values for name, values in scratch.items()})
            self._adamw.run()
            for name, values in self._shares.items():
                buffers[name].write(start // values, scratch[name])

    def close(self) -> None:
        """Free the sessions."""
        self._adamw.close()
        self._grad_norm.close()

    def _squares(self, names: Collection[str] | None) -> float:
        """The sum of squares of some tensors' gradients, or of all."""
        total = 0.0
        for start, stop in self._state.pieces(names):
            self._grad_norm.bind({"grad": self._state.buffers["grad"].read(start, stop)})
            total += float(self._grad_norm.run_for(["sum_of_squares"])["sum_of_squares"].numpy())
        return total
