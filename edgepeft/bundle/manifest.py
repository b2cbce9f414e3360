"""The manifest of a bundle: what `manifest.json` holds, as dataclasses.

The exporter fills these in and the runtime reads them; nothing else passes between the two. Every field
is plain JSON, so that a driver in another language reads the same file.
"""

from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: `shape` mixes sizes with the names of symbolic axes, e.g. `["batch", 384]`."""

    name: str
    dtype: str  # numpy's name: "float32", "int64", …
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file of the bundle and its signature, adapter inputs included."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class LoraSlot:
    """A linear module that takes a LoRA.

    The graph computes `y += ((x @ A) * scaling) @ B` with three inputs: `A` float32 `[in_features, rank]`
    (PEFT's `lora_A.weight` transposed), `B` float32 `[rank, out_features]` (PEFT's `lora_B.weight`
    transposed) and `scaling` float32 `[rank]`. Rank 0 switches the slot off exactly; adapters mix by
    concatenation along the rank axis. `a_input` and `b_input` are PEFT's state-dict keys.

    In the inference graph `scaling` may also be `[batch, 1, …, rank]` with `activation_axes` axes, as many as
    `x` has: then every row of the batch has scalings of its own. `activation_axes` is 0 where the first axis
    of `x` is not the batch.
    """

    module: str
    in_features: int
    out_features: int
    a_input: str
    b_input: str
    scaling_input: str
    activation_axes: int = 0


@dataclass(frozen=True)
class SavedModule:
    """A parameter that an adapter replaces whole (PEFT's `modules_to_save`), such as a classification head.

    `input` is the graph input and PEFT's state-dict key; `default` names the tensor of `weights.bin` to feed
    where the adapter does not carry it.
    """

    module: str
    parameter: str
    input: str
    shape: tuple[int, ...]
    default: str


@dataclass(frozen=True)
class WeightTensor:
    """A tensor in `weights.bin`: raw little-endian bytes at a 64-aligned offset, on pages of its own (4096)
    but where several are parts of a larger one."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class MemoryTerm:
    """`bytes * batch**batch_power * seq_len**seq_power * rank**rank_power * past**past_power`.

    `past` is the length of the key/value cache that a run begins with.
    """

    bytes: float
    batch_power: int = 0
    seq_power: int = 0
    rank_power: int = 0
    past_power: int = 0


@dataclass(frozen=True)
class MemoryFormula:
    """Bytes one session needs beyond the process it runs in.

    peak = `session_bytes` + (1 + `arena_gaps`) · the maximum over `peaks` of the sum of that list's terms.
    `session_bytes` is what loading the graph costs (nodes, initializers, prepacked copies) and `arena_gaps`
    what onnxruntime's arena leaves between tensors, per byte of them; both are measured at export in a clean
    process. Each list of terms is the sum of the tensors alive at one moment of the run that is the largest
    for some size.
    """

    session_bytes: int
    peaks: tuple[tuple[MemoryTerm, ...], ...]
    arena_gaps: float = 0.0

    def activation_bytes(self, batch: int, seq_len: int, rank: int, past: int = 0) -> int:
        """Bytes of the tensors alive at the worst moment of one run."""

        def value(term: MemoryTerm) -> float:
            sizes: int = batch**term.batch_power * seq_len**term.seq_power * rank**term.rank_power
            cached: int = past**term.past_power
            return term.bytes * sizes * cached

        return max((int(sum(map(value, terms))) for terms in self.peaks), default=0)

    def arena_bytes(self, batch: int, seq_len: int, rank: int, past: int = 0) -> int:
        """What the arena takes for the tensors alive at the worst moment of one run, with its gaps."""
        return int((1 + self.arena_gaps) * self.activation_bytes(batch, seq_len, rank, past))


@dataclass(frozen=True)
class Stage:
    """One stage of the chain: the roles of its graphs, and what their inputs are bound to, by input name.

    `forward` makes what `backward` needs, `kept.*`, and `output` the next stage's `hidden` of that; where
    `output` is null, `forward` makes `hidden.out` itself. `backward` is null before the first stage that
    trains, and in inference. `weights` names tensors of `weights.bin`, `adapter` adapter inputs, `context`
    outputs of the context graph or inputs of the model. `cache` says which `present.*` output of the
    inference graph an output of `forward` is. Of the weight inputs in `lookups` only the rows are read that
    the values of an input of the model name.
    """

    forward: str
    output: str | None
    backward: str | None
    weights: dict[str, str]
    adapter: dict[str, str]
    context: dict[str, str]
    cache: dict[str, str] = field(default_factory=dict)
    lookups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VocabularyHead:
    """The output layer of a language model and its loss, a slice of the vocabulary at a time.

    Roles of graphs: `scan` gathers each position's log-normalizer and the logit of its label, `spread` also
    what the cotangent of the hidden state is made of, `loss` makes the loss and `cotangent` the cotangent of
    what was gathered. `weights` are bound by rows `[first, last)` of `rows` rows.
    """

    scan: str
    spread: str
    loss: str
    cotangent: str
    weights: dict[str, str]
    rows: int


@dataclass(frozen=True)
class Partition:
    """The training graph as a chain of stages, equal ones sharing their graphs.

    `context` is the role of the graph of what the stages share (null: nothing but model inputs), and
    `context_weights` what its weight inputs are bound to. What follows the stages is either the `head`, whose
    graphs both return the loss, or a `vocabulary_head`.
    """

    context: str | None
    context_weights: dict[str, str]
    stages: tuple[Stage, ...]
    head: Stage | None = None
    vocabulary_head: VocabularyHead | None = None

    @property
    def stages_and_head(self) -> tuple[Stage, ...]:
        """The stages, and the head where it is one."""
        return self.stages if self.head is None else (*self.stages, self.head)


RESIDENT, CHECKPOINTED, STREAMED, FORWARD_ONLY = "resident", "checkpointed", "streamed", "forward-only"


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of a language model, a slice of the vocabulary at a time.

    `graph` makes `logits` of `hidden` and rows `[first, last)` of `weights`, of `rows` rows.
    """

    graph: str
    weights: dict[str, str]
    rows: int


@dataclass(frozen=True)
class StreamedInference:
    """The inference graph as a chain of stages, for budgets that cannot hold it whole.

    `context` and `context_weights` are as in `Partition`. The last stage makes the inference graph's first
    output, or, where there is an `output_layer`, what that layer is given. `memory` leaves out the key/value
    cache and the logits.
    """

    context: str | None
    context_weights: dict[str, str]
    stages: tuple[Stage, ...]
    output_layer: OutputLayer | None
    memory: MemoryFormula


@dataclass(frozen=True)
class GroupedSlot:
    """A LoRA slot of the decoder graph: its module, and the column of the group's output that its own begin
    at."""

    module: str
    first: int


@dataclass(frozen=True)
class LoraGroup:
    """LoRA slots that are computed at once, since one product makes the outputs of their modules.

    The decoder graph computes `y += (x @ A) @ B` with `A` float32 `[in_features, R]` and `B` float32
    `[R, out_features]`, where R is the sum of the slots' ranks: their factors stand side by side, and `B`,
    each row of it times its rank's scaling, is zero outside a slot's own ranks and columns.
    """

    slots: tuple[GroupedSlot, ...]
    in_features: int
    out_features: int
    a_input: str
    b_input: str


@dataclass(frozen=True)
class DecoderGraph:
    """The graph that generates, over a key/value cache that stays where it is.

    `past_key_values.*` and `present.*` are `[batch, kv_heads, capacity, head_dim]` and are bound to the same
    memory. `seqlens_k` int32 `[batch]` is a row's tokens but one, those of this run included, and
    `total_sequence_length` int32 `[1]` the most tokens of a row; more than one row read one token each, and
    one row any number. `logits` float32 `[batch, vocab]` are of the last token of each row. `memory` leaves
    out the cache.

    `plain_graph` is the same without LoRA inputs, for no adapter. `int8_graph` and `int8_plain_graph` are
    these two with products that round the activations to 8 bits; null where no weight is quantized. A formula
    is of the graph with LoRA inputs, and above what the plain one needs.
    """

    graph: str
    plain_graph: str
    groups: tuple[LoraGroup, ...]
    memory: MemoryFormula
    int8_graph: str | None = None
    int8_plain_graph: str | None = None
    int8_memory: MemoryFormula | None = None

    @property
    def pairs(self) -> tuple[tuple[str | None, str | None], ...]:
        """Graphs with LoRA inputs, each with the plain one of the same arithmetic: exact, 8-bit."""
        return (self.graph, self.plain_graph), (self.int8_graph, self.int8_plain_graph)

    def adapted_twin(self, role: str) -> str | None:
        """The graph with LoRA inputs that a plain graph is the same as; None if `role` is no plain graph."""
        return next((adapted for adapted, plain in self.pairs if plain == role), None)

    def plain_twin(self, role: str) -> str | None:
        """The plain graph that a graph with LoRA inputs is the same as; None if `role` is none."""
        return next((plain for adapted, plain in self.pairs if adapted == role), None)


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

    `trainable` lists the inputs that may train (a subset of the slots' `a_input`, `b_input` and the saved
    modules' `input`); `max_steps` bounds the steps of one update and `max_relative_change` the L2 norm of an
    update divided by the norm of what it started from; null leaves either open.
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
class ModelInfo:
    """What the tasks need to know of the base model.

    `max_length` and `min_length` bound the axis `sequence`: tokens, or samples of a recording; a model of
    images has no such axis and 1 for both. `vocab_size` is 0 for a model that takes no tokens.
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


@dataclass(frozen=True)
class Calibration:
    """How weights of 4 or 8 bits were rounded with regard to what the layers read.

    Attributes:
        method: `gptq`.
        records: that were run through the model.
        rounded: weights of that many bits that were rounded to the nearest all the same: an embedding, a
            linear that no record reached.
    """

    method: str
    records: int
    rounded: tuple[str, ...]


@dataclass(frozen=True)
class Quantization:
    """How base weights are stored: `bits` 4, 8 (blockwise, symmetric), 16 (float16) or 32 (float32); what an
    ONNX file held already may have 2 bits too, and zero points.

    `exceptions` maps a weight's name to the bits it has instead (a size that no block divides, a norm's
    vector). `calibration` is null where all weights were rounded to the nearest.
    """

    bits: int
    block_size: int
    exceptions: dict[str, int] = field(default_factory=dict)
    calibration: Calibration | None = None


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
    lora_slots: tuple[LoraSlot, ...]
    saved_modules: tuple[SavedModule, ...]
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
