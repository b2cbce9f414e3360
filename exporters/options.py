"""What a caller may choose about an export, checked before anything is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from edgepeft.errors import UsageError
from edgepeft.sizes import parse_share, parse_size
from edgepeft.slots import LORA
from edgepeft.techniques import peft_methods

from .quantize.blockwise import BLOCK_SIZES

#: Name of the adapter that `rank` makes.
STARTING_ADAPTER = "default"


@dataclass(frozen=True)
class ExportOptions:
    """Options of `edgepeft.export`.

    Attributes:
        task: one of `edgepeft.bundle.validation.TASKS`; inferred from the model where None.
        bits: 4 or 8 (blockwise), 16 (float16) or 32 (float32) for the frozen matrices and the embedding; 4
            where None. Weights that are quantized already stay as they are then. At 4 bits those that matter
            most have 8, and the weights 5 bits on average, scales included (in blocks of 32).
        quick: round each weight to the nearest, all with `bits`. Otherwise, at 4 bits, a language model is
            calibrated on text that it writes itself, which takes minutes.
        size: bytes of the quantized weights (such as "100MB"), at 4 bits; more of them have 8 bits then, or
            fewer.
        block_size: weights that share a scale, at 4 and 8 bits.
        adapters: PEFT LoRA folders by the name they get in the bundle.
        labels: classes of a new classification head.
        rank: makes a fresh adapter named `default` of this rank; with a `method`, the rank of its slots.
        targets: suffixes of the linears that get LoRA slots, besides those of `adapters`; None: those of
            `adapters`, or every linear but the output head where there are none; empty: those of `adapters`
            alone. Of an ONNX file also names of nodes and of initializers.
        lora_alpha: of the fresh adapter; twice the rank where None.
        lora_dropout: of the fresh adapter: the share of values that training drops in front of its factors.
            The training graphs can drop where an adapter of the export says so, and nowhere else.
        method: the technique of the slots at `targets`, one of `edgepeft.techniques` that PEFT has adapters
            of; where `targets` is None, at the modules that PEFT takes for it.
        loss: a loss other than the task's own: `triplet`, for feature-extraction.
        drift_penalty: let the loss also count how far the logits drift from the base model's.
        calibration: records (a JSONL file by path, or mappings) that are like what the model will read, a few
            hundred: at 4 and 8 bits the linears are quantized so that what they compute of these comes
            nearest (GPTQ), which takes minutes. None: see `quick`.
        prune: the share of the linears' weights (0.25 or "25%"; the embedding and the output layer do not
            count) that is removed before anything else is done: channels of the feed-forward layers, chosen
            by `calibration`, or by text that the model writes itself.
        max_length: tokens that the bundle reads at most, prompt and answer together; the model's where None.
            Tables of positions are as long, which is most of what a long context takes in the file.
        keep_vocabulary: records (a JSONL file by path, or mappings) like those that the model will read and
            write: the tokens that these need stay, with whatever makes other texts readable, and the others
            are taken out of the tokenizer, the embedding and the output layer. Texts of the records are read
            as before. Of a model whose tokenizer is BPE, Unigram or WordPiece; not of an ONNX file.
        train: also write the training graphs.
        verify: compare logits, losses, gradients and what is generated with PyTorch (of an ONNX file:
            outputs with the file's, gradients with finite differences), and refuse a bundle that differs.
            Tokens, chat templates and labels, which take no time, are compared in any case.
        seed: draws a new head and a fresh adapter.
        force: take adapters that say they were trained on another base.

    Raises:
        UsageError: an option cannot be used.
    """

    task: str | None = None
    bits: int | None = None
    quick: bool = False
    size: int | str | None = None
    block_size: int = 32
    adapters: Mapping[str, str | Path] | None = None
    labels: Sequence[str] | None = None
    rank: int | None = None
    targets: Sequence[str] | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    method: str = LORA
    loss: str | None = None
    drift_penalty: bool = False
    calibration: str | Path | Iterable[Mapping[str, Any]] | None = field(default=None, repr=False)
    prune: float | str | None = None
    max_length: int | None = None
    keep_vocabulary: str | Path | Iterable[Mapping[str, Any]] | None = field(default=None, repr=False)
    train: bool = True
    verify: bool = True
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8, 16, 32):
            raise UsageError(f"bits must be 4, 8, 16 or 32, got {self.bits}")
        if self.quick and self.calibration is not None and self.prune_share is None:
            raise UsageError("quick rounds to the nearest, calibration for records: leave one of them out")
        if self.size_bytes is not None and (self.quick or self.bits not in (None, 4)):
            raise UsageError(
                "size says which weights have 4 bits and which 8: it goes with 4 bits, and not with quick"
            )
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(f"block_size must be one of {sizes}, got {self.block_size}")
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length must be one token or more, got {self.max_length}")
        if self.method not in (known := peft_methods()):
            raise UsageError(f"method is {self.method!r}, expected one of {', '.join(known)}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if self.lora_dropout and (self.rank is None or self.method != LORA):
            raise UsageError("lora_dropout is of the fresh LoRA that rank makes: give a rank")
        if self.rank is not None and self.method == LORA and STARTING_ADAPTER in (self.adapters or {}):
            raise UsageError(
                f"an adapter is named {STARTING_ADAPTER!r}, the name that rank gives a fresh one"
            )

    @property
    def size_bytes(self) -> int | None:
        """`size` as a number."""
        return None if self.size is None else parse_size(self.size)

    @property
    def prune_share(self) -> float | None:
        """`prune` as a number."""
        return None if self.prune is None else parse_share(self.prune)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Options from keyword arguments.

        Raises:
            UsageError: there is none of that name.
        """
        known = [item.name for item in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise UsageError(f"export takes no option {unknown[0]!r}: it takes {', '.join(known)}")
        return cls(**options)
