"""What a caller may choose about an update, checked before anything is opened."""

from dataclasses import dataclass

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.optimizer_state import OPTIMIZER_STATES
from edgepeft.errors import UsageError
from edgepeft.techniques import peft_slots

from ..inputs import has_drift_penalty
from .steps.schedule import SCHEDULES

DEFAULT_SEQ_LEN = 128
DEFAULT_SAMPLES = 10 * 16_000
"""Ten seconds at 16 kHz."""
DEFAULT_RANK = 8
TRAINABLE = ("all", "lora", "lora_B", "modules_to_save", "head")


def choices_to_train(manifest: Manifest) -> tuple[str, ...]:
    """What `trainable` may be, for a bundle's own techniques too."""
    found = [name for _, item in peft_slots(manifest.slots) for name in (item.name, *item.parts)]
    return tuple(dict.fromkeys([*TRAINABLE, *found]))


@dataclass(frozen=True)
class TrainingOptions:
    """Options of one update.

    Attributes:
        add_labels: names of classes that the bundle's classifier does not have yet.
        adapter: name (or path) of the adapter to start from; None takes the bundle's first.
        rank: start a fresh adapter of this rank on every slot instead.
        method: start a fresh adapter of this technique instead, such as `ia3`; of rank 8 where it has one and
            none is given.
        trainable: `all`, only the `lora` factors, of them only `lora_B` (LoRA-FA, arXiv 2308.03303), only
            `modules_to_save`, or a classifier's `head` in closed form, which takes no steps.
        top_blocks: train only the adapters of so many of the topmost transformer blocks, and saved modules.
        steps: optimizer steps; None derives them from `epochs`.
        epochs: passes over the training records; None, as for the rate and the warm-up, leaves it to
            `with_defaults`.
        batch_size: records (or pairs) that are computed at once.
        accumulation_steps: batches whose gradients make one step, as one batch of all their records would.
        seq_len: tokens a text is cut to, or samples a recording; None is 128 tokens or 160,000 samples, or
            the model's maximum if that is less. Images have none.
        learning_rate: peak rate.
        lora_plus_ratio: how many times that rate `B` of a LoRA learns at, and what has one axis (LoRA+, arXiv
            2402.12354), such as 16; None: the same rate.
        warmup_steps: steps over which the rate rises from 0.
        schedule: `linear`, `cosine` or `constant` after the warm-up.
        weight_decay: of AdamW.
        strategy: how to train, by its name in the manifest; None takes the first with exact gradients that
            fits the budget.
        optimizer_state: `32bit` moments of AdamW, or `8bit` ones, which need a quarter of the memory.
        max_grad_norm: global gradient norm to clip to; 0 switches clipping off, and a chain of stages then
            updates what a stage trains before it goes on to the next one's gradients.
        drift_weight: of the drift penalty, in a bundle that was exported with one.
        eval_fraction: share of the records that is held out to judge the update.
        seed: of the split, the batches and a fresh adapter.
        resume: continue from the checkpoint beside the output, if there is one.
    """

    add_labels: tuple[str, ...] = ()
    adapter: str | None = None
    rank: int | None = None
    method: str | None = None
    trainable: str = "all"
    top_blocks: int | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    accumulation_steps: int = 1
    seq_len: int | None = None
    learning_rate: float | None = None
    lora_plus_ratio: float | None = None
    warmup_steps: int | None = None
    schedule: str = "linear"
    weight_decay: float = 0.0
    strategy: str | None = None
    optimizer_state: str = "32bit"
    max_grad_norm: float = 1.0
    drift_weight: float | None = None
    eval_fraction: float = 0.1
    seed: int = 0
    resume: bool = False

    def check(self, manifest: Manifest) -> None:
        """Raise where an option is out of range for this bundle.

        Raises:
            UsageError: names the option, its value and what is allowed.
        """
        for name, value, low in (
            ("rank", self.rank, 1),
            ("top_blocks", self.top_blocks, 1),
            ("steps", self.steps, 1),
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("accumulation_steps", self.accumulation_steps, 1),
            ("seq_len", self.seq_len, 2),
            ("warmup_steps", self.warmup_steps, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and (type(value) is not int or value < low or value >= 2**31):
                raise UsageError(f"{name} is {value!r}, expected a whole number of at least {low}")
        for name, number in (
            ("learning_rate", self.learning_rate or 0.0),
            ("lora_plus_ratio", self.lora_plus_ratio or 0.0),
            ("weight_decay", self.weight_decay),
            ("drift_weight", self.drift_weight or 0.0),
            ("max_grad_norm", self.max_grad_norm),
        ):
            if not isinstance(number, int | float) or not 0 <= number <= 1e9:
                raise UsageError(f"{name} is {number!r}, expected a number from 0")
        if not 0 < self.eval_fraction < 1:
            raise UsageError(
                f"eval_fraction is {self.eval_fraction!r}, expected between 0 and 1: every update is judged"
            )
        for name, choice, choices in (
            ("schedule", self.schedule, SCHEDULES),
            ("trainable", self.trainable, choices_to_train(manifest)),
            ("optimizer_state", self.optimizer_state, tuple(OPTIMIZER_STATES)),
        ):
            if choice not in choices:
                raise UsageError(f"{name} is {choice!r}, expected one of {', '.join(choices)}")
        self._check_strategy(manifest)
        role = OPTIMIZER_STATES[self.optimizer_state].role
        if manifest.strategies and role not in manifest.graphs:
            raise UsageError(
                f"optimizer_state is {self.optimizer_state!r}, but the bundle has no graph {role!r}: export "
                "it again"
            )
        if self.starts_fresh and self.adapter is not None:
            raise UsageError(
                "both an adapter to start from and the rank or method of a fresh one are given: give one of "
                "them"
            )
        if self.add_labels and not manifest.takes_labels:
            raise UsageError(
                "add_labels: this bundle's outputs are no labels of a linear head, or it was exported before "
                "heads could grow: export the model again"
            )
        if self.trainable == "head" and (self.steps, self.epochs) != (None, None):
            raise UsageError(
                "trainable is 'head', which is fitted in closed form and takes no steps: leave out steps and "
                "epochs"
            )
        if self.drift_weight is not None and not has_drift_penalty(manifest):
            raise UsageError(
                f"drift_weight is {self.drift_weight}, but the bundle has no drift penalty: export it with "
                "--drift-penalty"
            )
        if self.seq_len is not None and manifest.task == "image-classification":
            raise UsageError(f"seq_len is {self.seq_len}, but images have no length to cut: leave it out")
        if self.tokens(manifest) > manifest.model.max_length:
            raise UsageError(
                f"seq_len is {self.seq_len}, the model takes at most {manifest.model.max_length} tokens"
            )
        limit = manifest.policy.max_steps
        if limit is not None and self.steps is not None and self.steps > limit:
            raise UsageError(f"steps is {self.steps}, the bundle's policy allows {limit} an update")

    def _check_strategy(self, manifest: Manifest) -> None:
        if self.strategy is None:
            return
        exact = {strategy.name: strategy.exact for strategy in manifest.strategies}
        if self.strategy not in exact:
            raise UsageError(
                f"strategy is {self.strategy!r}, the bundle has {', '.join(exact) or 'none: export it again'}"
            )
        if not exact[self.strategy] and self.lora_plus_ratio is not None:
            raise UsageError(
                f"lora_plus_ratio is {self.lora_plus_ratio!r}, but {self.strategy} has one rate for all: "
                "leave it out"
            )
        if not exact[self.strategy] and self.optimizer_state != "32bit":
            raise UsageError(
                f"optimizer_state is {self.optimizer_state!r}, but {self.strategy} keeps none: leave it out"
            )

    @property
    def starts_fresh(self) -> bool:
        """Whether a new adapter is trained."""
        return self.rank is not None or self.method is not None

    @property
    def updates_in_backward(self) -> bool:
        """Whether nothing has to wait for all gradients of a step: neither their norm nor another batch."""
        return not self.max_grad_norm and self.accumulation_steps == 1

    @property
    def records_per_step(self) -> int:
        """Records (or pairs) of one optimizer step."""
        return self.batch_size * self.accumulation_steps

    def tokens(self, manifest: Manifest) -> int:
        """Tokens a text is cut to, or samples a recording; 1 for images."""
        if self.seq_len is not None:
            return self.seq_len
        default = DEFAULT_SAMPLES if manifest.task == "audio-classification" else DEFAULT_SEQ_LEN
        return min(default, manifest.model.max_length)
