"""Slots: the places of a model's graphs that an adapter fills, whatever technique it is of.

A slot says which inputs of the graphs are its own, what an adapter's file calls them, and what they are fed
where an adapter has nothing there. What is computed with them, the graphs say; what an adapter's tensors mean
and how several of them go together, the slot's technique (`edgepeft.techniques`).
"""

from dataclasses import dataclass, field

PREFIX = "base_model.model."
"""What PEFT's state-dict keys begin with, before the name of a module."""

LORA, WHOLE, TRAINABLE_TOKENS = "lora", "whole", "trainable_tokens"
"""Techniques: a low-rank product beside a linear module, a parameter that is replaced whole, and rows of the
embedding of tokens, which a LoRA may have beside it."""

LINEAR, PARAMETER, EMBEDDING, ATTENTION = "linear", "parameter", "embedding", "attention"
"""Sites: a linear module, a parameter of any module, an embedding, a layer's keys and values."""

CONVOLUTION = "convolution"
"""Site: a module that convolves."""

SIZE = "size"
"""In a shape: the axis that an adapter chooses the size of, such as LoRA's rank."""

SIZE_AXIS = "rank_"
"""In a graph: how the name of such an axis begins, of which every slot has its own."""

EMPTY, ZEROS, ONES = "empty", "zeros", "ones"
"""Neutral values that are no tensor of `weights.bin`."""


@dataclass(frozen=True)
class SlotTensor:
    """One input of a slot, float32.

    Attributes:
        name: what the technique calls it.
        input: the graphs' input.
        key: PEFT's state-dict key; null where the value follows from the adapter's configuration.
        shape: as the graphs take it; `size` is the axis that the adapter chooses the size of.
        transposed: whether PEFT's file has it with its two axes swapped.
        trains: whether it may.
        neutral: what to feed where the adapter has nothing: `empty` (of size 0), `zeros`, `ones` or the name
            of a tensor of `weights.bin`.
    """

    name: str
    input: str
    key: str | None
    shape: tuple[int | str, ...]
    transposed: bool
    trains: bool
    neutral: str

    @property
    def default(self) -> str | None:
        """The tensor of `weights.bin` that is fed where the adapter has nothing, if that is one."""
        return None if self.neutral in (EMPTY, ZEROS, ONES) else self.neutral

    def sized(self, size: int) -> tuple[int, ...]:
        """The shape for an adapter of this size."""
        return tuple(size if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class Slot:
    """A place that an adapter fills.

    Attributes:
        technique: a name of `edgepeft.techniques.MODULES`, which says what the tensors are.
        site: what the technique is applied to: `linear`, `parameter`, `embedding`, `convolution` or
            `attention`.
        module: the module's name in the model.
        tensors: the slot's inputs.
        settings: what else the technique has fixed at export.
        activation_axes: axes of what the module reads, the first of them the batch; 0 where the first axis is
            not the batch, so that the rows of a batch cannot have adapters of their own.
    """

    technique: str
    site: str
    module: str
    tensors: tuple[SlotTensor, ...]
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    activation_axes: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graphs' inputs."""
        return tuple(tensor.input for tensor in self.tensors)

    @property
    def is_packed(self) -> bool:
        """Whether a decoder graph takes the slot's values packed with others' (`LoraGroup`)."""
        return self.technique == LORA and self.site == LINEAR

    def tensor(self, name: str) -> SlotTensor:
        """The tensor that the technique calls so."""
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def input(self, name: str) -> str:
        """The graphs' input for the tensor that the technique calls so."""
        return self.tensor(name).input
