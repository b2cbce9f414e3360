"""What a plan is made of: the sizes it depends on, what is held, and the predicted peak."""

import math
from dataclasses import dataclass

# An update steps down before it reaches its budget, so a plan leaves that much of it free.
_MARGIN = 1.02
# A later process is never of exactly this one's size, so a suggested budget has this much more.
_NOISE_BYTES = 2**20


@dataclass(frozen=True)
class Workload:
    """The sizes a plan depends on.

    Attributes:
        rows: rows of a batch (a pair of sentences is two).
        seq_len: tokens (or samples) of the longest row; 1 for images.
        rank: the largest rank of the adapter.
        adapter_values: values in the adapter.
        trained_values: those of them that train.
        gradient_bytes: of a trained value's gradient; twice as many where gradients are added up.
        moment_bytes: of what the optimizer and the technique keep of a trained value.
        updates_in_backward: a chain of stages need not keep gradients until all are there.
        needs_gradients: estimates of them will not do.
    """

    rows: int
    seq_len: int
    rank: int
    adapter_values: int
    trained_values: int
    gradient_bytes: int = 4
    moment_bytes: float = 8.0
    updates_in_backward: bool = False
    needs_gradients: bool = False


@dataclass(frozen=True)
class Held:
    """What a chain of stages holds in memory to save time.

    Attributes:
        stages: that many of the last stages keep what their backward pass needs.
        weights: pages of the weight file stay in the process.
        cached: weights that do not stay are read through the system's page cache, for which there is room.
        stride: what enters a stage is kept for one stage in so many, and computed anew for the others.
    """

    stages: int = 0
    weights: bool = False
    cached: bool = True
    stride: int = 1


NOTHING_HELD = Held()


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one strategy, in bytes, by what it is made of.

    `relative_step` is the predicted time of a step, that of the resident graph being 1; None where a step is
    not the same thing. One that `updates_in_backward` never has the gradients of more than a stage.
    """

    strategy: str
    exact: bool
    process_bytes: int
    session_bytes: int
    activation_bytes: int
    state_bytes: int
    evaluation_bytes: int
    held: Held = NOTHING_HELD
    stages: int = 0
    state_in_file: bool = False
    updates_in_backward: bool = False
    relative_step: float | None = 1.0

    @property
    def label(self) -> str:
        """The strategy, what it holds, where its state is, and if its gradients are estimates."""
        parts = [self.strategy]
        if not self.exact:
            parts.append("estimated gradients")
        if self.held.stages:
            parts.append(f"{self.held.stages} of {self.stages} stages held")
        if self.state_in_file:
            parts.append("state in a file")
        if self.updates_in_backward:
            parts.append("updated stage by stage")
        if self.held.stride > 1:
            parts.append(f"1 input in {self.held.stride} kept")
        return ", ".join(parts)

    @property
    def training_bytes(self) -> int:
        """Peak while training."""
        return self.process_bytes + self.session_bytes + self.activation_bytes + self.state_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak of the whole update: training, or the evaluation before and after it."""
        return max(self.training_bytes, self.process_bytes + self.state_bytes + self.evaluation_bytes)

    def fits(self, budget_bytes: int) -> bool:
        """Whether the peak leaves a margin of the budget free."""
        return self.peak_bytes * _MARGIN <= budget_bytes

    @property
    def smallest_budget_bytes(self) -> int:
        """The budget to suggest: one that it fits, in whole mebibytes."""
        return suggested_budget(self.peak_bytes)


def suggested_budget(peak_bytes: int) -> int:
    """A peak and a small margin, in whole mebibytes."""
    return math.ceil((peak_bytes * _MARGIN + _NOISE_BYTES) / 2**20) * 2**20
