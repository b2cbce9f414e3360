"""The manifest of a bundle: what `manifest.json` holds, as dataclasses.

The exporter fills these in and the runtime reads them; nothing else passes between the two. Every field
is plain JSON, so that a driver in another language reads the same file.
"""

from dataclasses import dataclass, field
from typing import Any

from ..slots import Slot, SlotTensor
from .memory_formula import MemoryFormula
from .wiring import DecoderGraph, Partition, StreamedInference

FORMAT_VERSION = 2


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: `shape` mixes sizes with the names of symbolic axes, e.g. `["batch", 384]`."""

    name: str
    dtype: str  # numpy's name: "float32", "int64", …
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file of the bundle and its signature, adapter inputs included.

    `folds`: what is computed of constants alone (scales of products, halves of bytes) is to be computed once,
    when a session is opened. onnxruntime does, unless it is told not to.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    folds: bool = False


#: Output of a graph that holds what a linear head reads, and the axis that has an entry for each label.
FEATURES, LABELS = "features", "labels"


@dataclass(frozen=True)
class LinearHead:
    """The linear layer that makes a classifier's outputs: `logits = features @ weight.T + bias`.

    `weight` and `bias` are inputs of slots of the technique `whole`, `[outputs, width]` and `[outputs]`
    (null: it has none). The inference graph and the head of the chain put out `features` float32 `[batch,
    width]`, or `[batch, sequence, width]` where every token has a label.
    """

    weight: str
    bias: str | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of both."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class WeightTensor:
    """A tensor in `weights.bin`: raw little-endian bytes at a 64-aligned offset, on pages of its own (4096)
    but where several are parts of a larger one."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


RESIDENT, CHECKPOINTED, STREAMED, FORWARD_ONLY = "resident", "checkpointed", "streamed", "forward-only"
STREAMED_INFERENCE, DECODER = "streamed inference", "decoder graph"
"""In `Manifest.missing`, beside names of strategies."""


@dataclass(frozen=True)
class Strategy:
    """A way to train: the graph it runs (null: the stages of the partition) and what it needs.

    `resident` runs one graph that keeps all its activations. Of the two that run the stages, pages of the
    weights stay in the process with `checkpointed` and go after each stage with `streamed`.

    `exact` is false for zeroth-order methods (`forward-only`), which run the stages' forward graphs or, where
    there is no partition, the inference graph and the loss.
    """

    name: str
    graph: str | None
    exact: bool
    memory: MemoryFormula


@dataclass(frozen=True)
class Policy:
    """What an update on the device may do.

    `trainable` lists the inputs that may train (a subset of those of the slots' tensors that `trains` is true
    of); `max_steps` bounds the steps of one update and `max_relative_change` the L2 norm of an update divided
    by the norm of what it started from; null leaves either open.
    """

    trainable: tuple[str, ...]
    max_steps: int | None = None
    max_relative_change: float | None = None


@dataclass(frozen=True)
class ImagePreprocessing:
    """How an image uint8 `[height, width, channels]` becomes `pixel_values`, in this order.

    Resize: to `height` x `width`, or so that the shorter edge is `shortest_edge`, or not at all. `resample`
    is `nearest`, `bilinear`, `bicubic` or `lanczos`, as Pillow computes it. Crop the middle, `crop_height` x
    `crop_width`. Multiply by `rescale_factor`, subtract `mean`, divide by `std`, a value a channel.
    """

    resample: str
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    crop_height: int | None = None
    crop_width: int | None = None

    @property
    def output_size(self) -> tuple[int | None, int | None]:
        """Height and width of what comes out; None where they depend on the image."""
        if self.crop_height is not None:
            return self.crop_height, self.crop_width
        return self.height, self.width


@dataclass(frozen=True)
class AudioPreprocessing:
    """How a recording becomes `input_values`: mono at `sampling_rate` Hz, and with `normalize` divided by
    sqrt(variance + 1e-7) after its mean is subtracted."""

    sampling_rate: int
    normalize: bool


@dataclass(frozen=True)
class TextSettings:
    """How the model's own tokenizer is asked, beyond what `tokenizer.json` says.

    Attributes:
        truncation_side: where a text that is too long loses tokens: `right` or `left`.
        token_types: whether the model is told which of two texts a token is of; if not, all types are 0.
        split_special_tokens: whether special tokens that a text spells out are words like any.
    """

    truncation_side: str = "right"
    token_types: bool = True
    split_special_tokens: bool = False


@dataclass(frozen=True)
class GenerationSettings:
    """The model's own `generation_config.json`: names and meanings are transformers'.

    The first six are what holds where a caller says nothing; `temperature` is 0 unless the model samples.
    The others hold always.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """What the tasks need to know of the base model.

    `max_length` and `min_length` bound the axis `sequence`: tokens, or samples of a recording; a model of
    images has no such axis and 1 for both. `vocab_size` is 0 for a model that takes no tokens.
    `whole_vocab_size` is what the base model has, where tokens were taken out at export.
    """

    name: str
    model_type: str
    architecture: str
    max_length: int
    vocab_size: int
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()  # of a classifier: id to label
    embedding_size: int | None = None  # feature-extraction: width of `sentence_embedding`
    num_layers: int = 0
    loss: str | None = None  # a loss other than the task's own
    problem_type: str | None = None  # text- and image-classification: transformers' name, decides the labels
    decoder_start_token_id: int | None = None  # text2text-generation: what decoder_input_ids begin with
    min_length: int = 1
    prompts: dict[str, str] = field(default_factory=dict)  # feature-extraction: texts to put before a text
    default_prompt: str | None = None  # name of the one that is put there unless told otherwise
    mask_token_id: int | None = None  # fill-mask
    text: TextSettings = field(default_factory=TextSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    whole_vocab_size: int | None = None


@dataclass(frozen=True)
class Calibration:
    """How weights of 4 or 8 bits were rounded with regard to what the layers read.

    Attributes:
        method: `gptq`.
        records: that were run through the model.
        rounded: weights of that many bits that were rounded to the nearest all the same: an embedding, a
            linear that no record reached.
        inputs: what the records were: `records` of the caller's, or `own text`, which the model wrote itself.
        errors: by name, of what a weight makes of the records the fraction that is lost, the root of the mean
            squared error over that of the float model's.
    """

    method: str
    records: int
    rounded: tuple[str, ...]
    inputs: str = "records"
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantization:
    """How base weights are stored: `bits` 4, 8 (blockwise), 16 (float16) or 32 (float32); what an ONNX file
    held already may have 2 bits too.

    `exceptions` maps a weight's name to the bits it has instead (one that matters much, a size that no block
    divides, a norm's vector). `calibration` is null where all weights were rounded to the nearest.
    `bits_a_weight` counts scales and zero points, over all weights of 4 or 8 bits; null where there are none.
    """

    bits: int
    block_size: int
    exceptions: dict[str, int] = field(default_factory=dict)
    calibration: Calibration | None = None
    bits_a_weight: float | None = None


@dataclass(frozen=True)
class Pruning:
    """What was removed from the model before it was exported.

    Attributes:
        share: of the weights of the linears that are gone; the embedding and the output layer do not count.
        sizes: by the configuration's name for it, a size before and after: `intermediate_size`, `[1536,
            1024]`.
        records: that told which to remove.
        inputs: what these were, as `Calibration` has it.
        errors: by name, of what a weight that reads fewer channels makes of the records the fraction that has
            changed, as `Calibration` has it.
    """

    share: float
    sizes: dict[str, tuple[int, ...]]
    records: int
    inputs: str
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (hex) of one file of the bundle."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Graphs are keyed by role: `inference`, `loss`, `train`, `adamw`, `adamw8`, `grad_norm`
    and those that the partition names."""

    format_version: int
    edgepeft_version: str
    task: str
    model: ModelInfo
    quantization: Quantization
    graphs: dict[str, GraphSpec]
    inference_memory: MemoryFormula
    weights_file: str
    weights: dict[str, WeightTensor]
    slots: tuple[Slot, ...]
    adapters: tuple[str, ...]
    strategies: tuple[Strategy, ...]  # cheapest in time first; empty: exported with --no-train
    policy: Policy
    verification: dict[str, Any]  # what the exporter measured against PyTorch
    files: dict[str, FileEntry]
    partition: Partition | None = None  # null: exported with --no-train, or a model without a cut
    streamed_inference: StreamedInference | None = None  # null: a model without a cut
    image_preprocessing: ImagePreprocessing | None = None  # null: feed `pixel_values`
    audio_preprocessing: AudioPreprocessing | None = None  # null: feed `input_values`
    decoder: DecoderGraph | None = None  # null: no language model, or one whose cache cannot stay in place
    linear_head: LinearHead | None = None  # null: no classifier, or one whose outputs something else makes
    missing: dict[str, str] = field(default_factory=dict)  # ways to run that the model does not have, and why
    base: str | None = None  # SHA-256 (hex) that tells the base from others of its shape; null: not known
    pruning: Pruning | None = None  # null: the model is whole

    @property
    def adapter_inputs(self) -> dict[str, SlotTensor]:
        """The graph inputs that an adapter fills, by name, in the order of the slots."""
        return {tensor.input: tensor for slot in self.slots for tensor in slot.tensors}

    def slots_of(self, technique: str) -> tuple[Slot, ...]:
        """The slots of one technique."""
        return tuple(slot for slot in self.slots if slot.technique == technique)

    @property
    def packed_slots(self) -> tuple[Slot, ...]:
        """The slots whose values a decoder graph takes packed."""
        return tuple(slot for slot in self.slots if slot.is_packed)

    @property
    def takes_labels(self) -> bool:
        """Whether a classifier's head may have more labels than it was exported with."""
        if self.linear_head is None:
            return False
        specs = {spec.name: spec for spec in self.graphs["inference"].inputs}
        return isinstance(specs[self.linear_head.weight].shape[0], str)
