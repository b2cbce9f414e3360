"""How graphs that are cut from one model are run together: stages of a chain, and those of a decoder."""

from dataclasses import dataclass, field

from .memory_formula import MemoryFormula

#: Inputs of a decoder's graph: a row's tokens but one, int32 `[batch]`, and the longest row's, int32 `[1]`.
SEQLENS, TOTAL = "seqlens_k", "total_sequence_length"
#: How the training graph's inputs begin that say what is dropped in front of a module's LoRA.
DROPOUT = "dropout."


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

    `plain_graph` is the same without LoRA inputs, for no LoRA; both have the slots of other techniques.
    `int8_graph` and `int8_plain_graph` are these two with products that round the activations to 8 bits; null
    where no weight is quantized. A formula is of the graph with LoRA inputs, and above what the plain one
    needs.
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
