"""What a chain of stages costs beside its formula: pages of weights, what is held, and time."""

import ast
import dataclasses
import math
import operator
from collections.abc import Callable

from edgepeft.bundle.manifest import Manifest, TensorSpec
from edgepeft.bundle.wiring import Partition, Stage

from .plan import Held, Plan, Workload

# Measured on 2 x86 cores with SmolLM2-135M's shape at 128 tokens: seconds of a multiplication by one weight
# for one token, of decoding a quantized weight, and all else (norms, attention, small products) as a share of
# the products forward and backward.
_PRODUCT_S, _DECODE_S, _OTHER = 2 / 210e9, 0.5e-9, 0.5
# A stage that is computed anew leaves out its last product; of all else a third is forward.
_ANEW, _ANEW_OTHER = 0.85, 1 / 3
_PAGE_BYTES = 4096
# What Linux maps around a page that is touched, and of the blocks that evenly drawn rows hit, the share that
# those of a text hit: on MiniLM at 4, 8 and 32 bits, 8 docstrings of 128 tokens measured 0.4 to 0.6.
_AROUND_BYTES, _TEXT_ROWS = 2**16, 0.6
_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
# Gaps that values of many sizes leave in the arena.
_GAPS = 1.05


class ChainCost:
    """The costs of a chain for one workload.

    Args:
        manifest: of a bundle that has a partition.
        partition: it.
        workload: the sizes.
    """

    def __init__(self, manifest: Manifest, partition: Partition, workload: Workload) -> None:
        self._manifest, self._partition, self._workload = manifest, partition, workload
        self._stage_bytes = sum(_weights_of(manifest, stage) for stage in partition.stages_and_head)
        head = partition.vocabulary_head
        self._head_bytes = (
            0 if head is None else sum(manifest.weights[key].nbytes for key in head.weights.values())
        )

    @property
    def weight_bytes(self) -> int:
        """Weights that a step reads whole; of an embedding it reads rows."""
        return self._stage_bytes + self._head_bytes

    def held_bytes(self, held: Held) -> int:
        """What `held.stages` takes; the formula has that of the topmost stage that keeps anything."""
        count = len(self._partition.stages)
        kept = [self._kept_bytes(stage) for stage in self._partition.stages[count - held.stages :]]
        topmost = next((nbytes for nbytes in reversed(kept) if nbytes), 0)
        return int(_GAPS * (sum(kept) - topmost))

    def holding(self, plan: Plan, stages: int) -> Plan:
        """A chain's plan with so many stages held instead."""
        held = dataclasses.replace(plan.held, stages=stages)
        more_bytes = self.held_bytes(held) - self.held_bytes(plan.held)
        return dataclasses.replace(
            plan,
            held=held,
            activation_bytes=plan.activation_bytes + more_bytes,
            relative_step=self.relative_step(held),
        )

    def spared_bytes(self, stride: int) -> int:
        """What is not kept of the inputs of stages where only one in `stride` is."""
        stages = self._partition.stages
        kept = -(-len(stages) // stride) + stride - 1  # those, and one run of stages computed anew
        largest = max((self._hidden_bytes(stage) for stage in stages), default=0)
        return max(len(stages) - kept, 0) * largest

    def filled(self, plan: Plan, budget_bytes: int | None) -> Plan:
        """A plan that uses what the budget leaves for stages, the last ones first."""
        best = self.holding(plan, 0)
        for stages in range(1, len(self._partition.stages) + 1):
            more = self.holding(plan, stages)
            if budget_bytes is not None and not more.fits(budget_bytes):
                break
            best = more
        return best

    def relative_step(self, held: Held) -> float:
        """Seconds of a step relative to one of the resident graph."""
        quantization = self._manifest.quantization
        packed = quantization.bits <= 8
        # A block size of 0: a scale for a whole row or matrix, which weighs nothing.
        block_size = quantization.block_size if packed else 0
        bits = quantization.bits + (32 / block_size if block_size else 0)
        decode_s = _DECODE_S if packed else 0.0
        product_s = _PRODUCT_S * self._workload.rows * self._workload.seq_len
        stages, head = 8 * self._stage_bytes / bits, 8 * self._head_bytes / bits
        other_s = 2 * _OTHER * product_s * (stages + head)
        resident_s = stages * (2 * product_s + decode_s) + head * 2 * product_s + other_s
        anew = 1 - held.stages / len(self._partition.stages) + (1 - 1 / held.stride)
        chain_s = (
            stages * 2 * (product_s + decode_s)
            + head * (decode_s + 2 * product_s)
            + other_s
            + anew * (stages * (_ANEW * product_s + decode_s) + _ANEW_OTHER * other_s)
        )
        return chain_s / resident_s if resident_s else 1.0

    def _hidden_bytes(self, stage: Stage) -> int:
        """What a stage hands to the next."""
        outputs = self._manifest.graphs[stage.output or stage.forward].outputs
        return next(self._bytes(spec) for spec in outputs if spec.name == "hidden.out")

    def _kept_bytes(self, stage: Stage) -> int:
        if stage.output is None:
            return 0
        return sum(self._bytes(spec) for spec in self._manifest.graphs[stage.forward].outputs)

    def _bytes(self, spec: TensorSpec) -> int:
        sizes = {"batch": self._workload.rows}
        dims = (
            dim
            if isinstance(dim, int)
            else self._workload.rank
            if dim.startswith("rank")
            else sizes[dim]
            if dim in sizes
            else size_of(dim, self._workload.seq_len)
            for dim in spec.shape
        )
        return 4 * math.prod(dims)


def size_of(dim: str, seq_len: int) -> int:
    """The size of an axis: `seq_len` itself, or what an expression of it says, such as the frames of a
    recording, `((sequence//10)) - 1`."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(left), value(right))
            case ast.Constant(int() as number):
                return number
            case _:
                return seq_len

    try:
        return max(value(ast.parse(dim, mode="eval").body), 0)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return seq_len


def row_bytes(manifest: Manifest, partition: Partition, rows: int) -> int:
    """Pages of weights that are in the process while so many rows are looked up in them."""
    weights = {stage.weights[name] for stage in partition.stages for name in stage.lookups}
    return sum(
        min(weight.nbytes, rows * (weight.nbytes // max(weight.shape[0], 1) + _PAGE_BYTES))
        for weight in map(manifest.weights.__getitem__, weights)
    )


def mapped_row_bytes(manifest: Manifest, partition: Partition, rows: int) -> int:
    """Pages of the weight file that looking so many rows up brings into the process, where the graph maps it.

    A page brings its neighbours in. Rows drawn evenly would hit that many blocks; those of a text lie closer.
    What the output layer shares is read whole by it, and counted there.
    """
    sizes = _looked_up_sizes(manifest, partition)
    return int(sum(_TEXT_ROWS * nbytes * -math.expm1(-rows * _AROUND_BYTES / nbytes) for nbytes in sizes))


def most_mapped_row_bytes(manifest: Manifest, partition: Partition, rows: int) -> int:
    """As `mapped_row_bytes`, of a single batch: it may be of words that lie as far apart as they can."""
    return sum(min(nbytes, rows * _AROUND_BYTES) for nbytes in _looked_up_sizes(manifest, partition))


def _looked_up_sizes(manifest: Manifest, partition: Partition) -> list[int]:
    head = partition.vocabulary_head
    whole = set() if head is None else set(head.weights.values())
    weights = {stage.weights[name] for stage in partition.stages for name in stage.lookups} - whole
    return [max(manifest.weights[key].nbytes, 1) for key in weights]


def largest_stage_bytes(manifest: Manifest, partition: Partition) -> int:
    """Weights that are in the process at once where their pages do not stay."""
    return max(_weights_of(manifest, stage) for stage in partition.stages_and_head)


def _weights_of(manifest: Manifest, stage: Stage) -> int:
    """Bytes of the weights that a stage reads whole."""
    whole = {key for name, key in stage.weights.items() if name not in stage.lookups}
    return sum(manifest.weights[key].nbytes for key in whole)
