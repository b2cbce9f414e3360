"""AdaLoRA's steps: the orthogonality of its factors, the importance of its ranks, and how many there are.

- The loss has `orth_reg_weight` times the mean of `‖P Pᵀ - I‖` (Frobenius) over all factors, as PEFT's; the
  gradient of one is `2 (P Pᵀ - I) P / ‖P Pᵀ - I‖`.
- Of every value, the sensitivity `|value · gradient|` is averaged over steps (`importance`, beta1), and how
  far it is from its average (`uncertainty`, beta2). A rank's score is their product at its singular value,
  plus its mean over the rank's row of A and over its column of B.
- In the steps after `tinit` and up to `tfinal` before the end, every `deltaT`, the ranks of the lowest
  scores, over all modules, have their singular values set to zero, so many that the budget is left. It falls
  from `init_r` to `target_r` a module with the cube of the share of these steps that is still to come. Ranks
  may come back until the last of them; then they are chosen for good.

Steps count from 1, so that the last allocation takes place with `tfinal = 0`, too. Where scores are equal,
the first ranks go, and never more than the budget asks for: PEFT drops all that equal the last.

Source: arXiv 2303.10512, sections 3.1 to 3.3; `peft.tuners.adalora`.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.adapters import Adapter
from edgepeft.errors import UsageError
from edgepeft.slots import Slot
from edgepeft.techniques.adalora import E, pattern_key, setting
from edgepeft.techniques.lora import A, B

from ..state.buffers import TrainingState
from .base import Steps

FloatArray = npt.NDArray[np.float32]

IMPORTANCE, UNCERTAINTY = "importance", "uncertainty"
_KEPT = "kept_ranks"
# Of a fresh adapter's steps, the shares that come before ranks fall and after, and between two allocations:
# those of PEFT's example.
_BEFORE, _AFTER, _BETWEEN = 10, 5, 100


class AdaLoraSteps(Steps):
    """See the module."""

    averages = (IMPORTANCE, UNCERTAINTY)
    needs_gradients = True

    def __init__(
        self, adapter: Adapter, slots: Sequence[Slot], state: TrainingState, remembered: dict[str, Any]
    ) -> None:
        super().__init__(adapter, slots, state, remembered)
        config = self._config
        self._factors = {slot.input(name): name for slot in self._slots for name in (A, B)}
        self._own = {slot.input(name) for slot in self._slots for name in (A, B, E)}
        ranks = [state.parameters[slot.input(E)].size for slot in self._slots]
        self._initial = sum(ranks)
        self._target = setting(config, "target_r") * len(ranks)
        self._last = setting(config, "total_step") - setting(config, "tfinal")
        kept = remembered.get(_KEPT, [[True] * rank for rank in ranks])
        if not isinstance(kept, list) or [len(mask) for mask in kept if isinstance(mask, list)] != ranks:
            raise UsageError("the checkpoint's ranks are not of this update: start over without --resume")

    @classmethod
    def prepared(cls, adapter: Adapter, names: Collection[str], steps: int, *, fresh: bool) -> Adapter:
        """With `total_step` for the steps of the update; the rest of a fresh adapter's schedule follows from
        it. One that has its budget keeps its ranks and its configuration.

        Raises:
            UsageError: a part of the adapter does not train, or its schedule has no step for a budget.
        """
        left_out = [key for key in adapter.tensors if adapter.technique.owns(key) and key not in names]
        if left_out:
            raise UsageError(
                f"AdaLoRA shares its ranks out among all its modules, and {left_out[0]} would not train: "
                "leave out what chooses tensors, or train another method"
            )
        config = adapter.config
        ranks = sum(adapter.rank(module) for module in adapter.modules)
        if ranks <= setting(config, "target_r") * len(adapter.modules):
            return adapter
        chosen: dict[str, Any] = {"total_step": steps}
        if fresh:
            chosen |= {
                "tinit": steps // _BEFORE,
                "tfinal": steps // _AFTER,
                "deltaT": max(1, steps // _BETWEEN),
            }
        config = config | chosen
        before, after = setting(config, "tinit"), setting(config, "tfinal")
        if before >= steps - after:
            raise UsageError(
                f"{adapter.origin}: its ranks fall after step {before} (tinit) and until {after} before the "
                f"end (tfinal), and the update has {steps} steps: give at least --steps {before + after + 1}"
            )
        return dataclasses.replace(adapter, config=config)

    def before_update(self, names: Collection[str]) -> float:
        """See `Steps.before_update`: the orthogonality."""
        weight = setting(self._config, "orth_reg_weight") / max(len(self._factors), 1)
        total = 0.0
        for name in names:
            if name not in self._factors:
                continue
            factor = self._state.parameters[name]
            by_rows = self._factors[name] == B
            distance: FloatArray = factor @ factor.T if by_rows else factor.T @ factor
            distance -= np.eye(len(distance), dtype=np.float32)
            norm = float(np.linalg.norm(distance))
            total += norm
            if norm and weight:
                distance *= np.float32(2 * weight / norm)
                gradient: FloatArray = distance @ factor if by_rows else factor @ distance
                self._state.put_gradient(name, gradient, add=True)
        return float(weight * total)

    def after_update(self, names: Collection[str], number: int, clip_coef: float) -> None:
        """See `Steps.after_update`: the averages."""
        # PEFT reads averages that it never made where the first step is the last that allocates.
        if self._initial <= self._target or number >= max(self._last, 2):
            return
        betas = {name: np.float32(setting(self._config, name)) for name in ("beta1", "beta2")}
        buffers = self._state.buffers
        importance, uncertainty = buffers[IMPORTANCE], buffers[UNCERTAINTY]
        for start, stop in self._state.pieces(self._own.intersection(names)):
            present = buffers["param"].read(start, stop) * buffers["grad"].read(start, stop)
            present *= np.float32(clip_coef)
            np.abs(present, out=present)
            average = betas["beta1"] * importance.read(start, stop)
            average += (1 - betas["beta1"]) * present
            importance.write(start, average)
            present -= average
            np.abs(present, out=present)
            spread = betas["beta2"] * uncertainty.read(start, stop)
            spread += (1 - betas["beta2"]) * present
            uncertainty.write(start, spread)

    def after_step(self, number: int) -> bool:
        """See `Steps.after_step`: singular values that are not in the budget are zero."""
        if self._initial <= self._target:
            return False
        before = setting(self._config, "tinit")
        if number == self._last:
            self._allocate(self._target)
        elif before < number < self._last and number % setting(self._config, "deltaT") == 0:
            to_come = 1 - (number - before) / (self._last - before)
            self._allocate(int((self._initial - self._target) * to_come**3 + self._target))
        elif number < self._last:
            return False
        for slot, kept in zip(self._slots, self._remembered[_KEPT], strict=True):
            name, mask = slot.input(E), np.array(kept, np.float32)
            self._state.replace(name, self._state.parameters[name] * mask)
        return True

    def finished(self, adapter: Adapter) -> Adapter:
        """Without the ranks that are not kept, and a pattern that says which these are of `init_r`."""
        if _KEPT not in self._remembered:
            return adapter
        initial, patterns = setting(self._config, "init_r"), dict(setting(self._config, "rank_pattern") or {})
        tensors = dict(adapter.tensors)
        for slot, kept in zip(self._slots, self._remembered[_KEPT], strict=True):
            mask, key = np.array(kept, bool), pattern_key(slot.module)
            pattern = np.array(patterns.get(key, [True] * initial))
            pattern[pattern] = mask
            patterns[key] = pattern.tolist()
            for name, ranks in ((A, np.s_[mask]), (E, np.s_[mask]), (B, np.s_[:, mask])):
                tensors[slot.input(name)] = np.ascontiguousarray(tensors[slot.input(name)][ranks])
        config = adapter.config | {"rank_pattern": patterns}
        found = dataclasses.replace(adapter, config=config, tensors=tensors)
        for slot in self._slots:  # with an alpha of 0 the factor follows what is left of the rank
            if scaling := found.scaling(slot.module):
                tensors[slot.input(E)] *= np.float32(adapter.scaling(slot.module) / scaling)
        return found

    def _allocate(self, budget: int) -> None:
        """Keep the ranks of the highest scores."""
        scores = [self._scores(slot) for slot in self._slots]
        dropped = np.argsort(np.concatenate(scores), kind="stable")[: self._initial - budget]
        kept = np.ones(self._initial, bool)
        kept[dropped] = False
        ends = np.cumsum([len(score) for score in scores])[:-1]
        self._remembered[_KEPT] = [mask.tolist() for mask in np.split(kept, ends)]

    def _scores(self, slot: Slot) -> FloatArray:
        """Of every rank of the slot."""
        parts = {name: self._product(slot.input(name)) for name in (A, B, E)}
        found: FloatArray = parts[E][0] + (parts[A].mean(0) + parts[B].mean(1))
        return found

    def _product(self, name: str) -> FloatArray:
        importance, uncertainty = (self._state.average(kind, name) for kind in self.averages)
        return importance * uncertainty


STEPS = AdaLoraSteps
