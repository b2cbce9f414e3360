"""What a technique does in the steps of an update beside following the gradient."""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from edgepeft.adapters import Adapter
from edgepeft.slots import Slot

from ..state.buffers import TrainingState


class Steps:
    """Nothing: a technique that does something overrides what it needs.

    A step goes: gradients, `before_update`, the optimizer, `after_update`, the policy's bound, `after_step`.
    Where gradients pass (`TrainingState.pass_gradients`) the three in the middle are done for a part of the
    tensors at a time.

    Args:
        adapter: as `prepared` gave it; its tensors may have gone.
        slots: of the bundle.
        state: what trains.
        remembered: what the technique knows beside the state's buffers, as JSON has it; it is part of
            checkpoints.

    Raises:
        UsageError: what is remembered is not of this update.
    """

    averages: ClassVar[tuple[str, ...]] = ()
    """Buffers of the state that the technique fills: a float32 for each trained value, zeros at first."""
    needs_gradients: ClassVar[bool] = False
    """Whether estimates along random directions will not do."""

    def __init__(
        self, adapter: Adapter, slots: Sequence[Slot], state: TrainingState, remembered: dict[str, Any]
    ) -> None:
        self._config, self._state, self._remembered = adapter.config, state, remembered
        self._slots = [
            slot
            for slot in slots
            if slot.technique == adapter.technique.name
            and any(name in state.parameters for name in slot.inputs)
        ]

    @classmethod
    def prepared(cls, adapter: Adapter, names: Collection[str], steps: int, *, fresh: bool) -> Adapter:
        """The adapter with the configuration for an update.

        Args:
            adapter: that the update starts from.
            names: its tensors that train.
            steps: of the update.
            fresh: the adapter was made for it; else its configuration is somebody's.

        Raises:
            UsageError: the technique cannot train it so.
        """
        del names, steps, fresh
        return adapter

    def before_update(self, names: Collection[str]) -> float:
        """Change the gradients of some tensors, which are complete; what is added to the loss."""
        del names
        return 0.0

    def after_update(self, names: Collection[str], number: int, clip_coef: float) -> None:
        """The tensors have been updated by their gradients times `clip_coef`, in the step `number` (from
        1)."""

    def after_step(self, number: int) -> bool:
        """All tensors have been updated, and may be changed; whether any was."""
        del number
        return False

    def finished(self, adapter: Adapter) -> Adapter:
        """The trained adapter as it is saved."""
        return adapter
