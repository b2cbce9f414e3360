"""Measure what running a graph costs: in a process of its own, by `with_session`.

    python -m edgepeft.exporters.measure.probe BUNDLE ROLE BATCH LENGTH BYTES

opens the bundle as a device does, runs the graph (with the role `stages`, the chain of stages, with `forward`
its forward part, with `streamed` streamed inference) once, in an arena for so many bytes of tensors, and
prints how much resident memory that added, in bytes.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.runtime.adapters.graph_inputs import is_decoder
from edgepeft.runtime.inputs import model_inputs
from edgepeft.runtime.key_value_cache import cache_bytes
from edgepeft.runtime.memory.arena import renew_shared_arena
from edgepeft.runtime.memory.process import PeakMemory, read_memory
from edgepeft.runtime.streamed_model import StreamedModel

from .feeds import axis_sizes, sample_adapter, sample_batch, sample_feeds
from .processes import Processes

#: Batch and sequence, in units, of runs that tell what a session takes and what gaps its arena has: a small
#: one, and the first of the others whose tensors are so much larger and not too large. The last two are for
#: small models; of large graphs, whose runs take their time, a third of the first tells enough. It does not
#: of stages, whose sessions take little beside tensors: SmolLM2-135M's chain was foretold 4 % too large.
SIZE, LARGER_BYTES, LARGEST_BYTES = (6, 4), 16 * 2**20, 256 * 2**20
LARGER = ((18, 64), (6, 64), (72, 64), (288, 64))
THIRD, THIRD_BYTES = (6, 64), 32 * 2**20
#: Of recordings one more: half a minute at the strides of wav2vec 2.0, where few and large tensors, those of
#: attention, may leave larger gaps.
RECORDING = (1, 1536)
#: As may those of texts where they outweigh the rest (a T5's biases by position): one more, if it takes so
#: many times the tensors of a fourth of its length.
TEXT, SQUARE = (2, 512), 8
#: The length of a third run is that part of the larger one's.
BETWEEN = 4
RANK = 1
#: Gaps where no run is large enough to tell: chains of MiniLM and SmolLM2-135M have 0.15 to 0.32, their
#: resident graphs 0.05 to 0.19.
ARENA_GAPS, MOST_GAPS = 0.3, 0.5
#: Stand for the chain of stages, for its forward part and for streamed inference, where a graph's role is
#: asked for.
STAGES, FORWARD, STREAMED = "stages", "forward", "streamed"


def with_session(
    processes: Processes,
    bundle: Path,
    role: str,
    tensors: MemoryFormula,
    length_unit: int,
    max_length: int,
) -> MemoryFormula:
    """The formula of graph `role` of the bundle at `bundle`, with what the session and the arena's gaps take.

    Args:
        processes: that measure.
        bundle: its folder.
        role: the graph's key in the manifest, `STAGES`, `FORWARD` or `STREAMED`.
        tensors: what a run of the graph holds. The session's arena keeps it.
        length_unit: the sequence of a run is a multiple of it.
        max_length: tokens or samples that the model takes, 1 of images.

    Raises:
        ExportError: the process failed.
    """

    def tensor_bytes(size: tuple[int, int]) -> int:
        return tensors.activation_bytes(size[0], size[1] * length_unit, RANK)

    def resident_bytes(size: tuple[int, int]) -> int:
        sizes = size[0], size[1] * length_unit, tensor_bytes(size)
        return int(processes.output("probe", bundle, role, *sizes))

    def line(larger: tuple[int, int]) -> tuple[float, float]:
        """The gaps, and what is held beside the tensors, of a line through two runs."""
        between = larger[0], larger[1] // BETWEEN
        if tensor_bytes(between) == tensor_bytes(larger):  # images have no length
            between, between_bytes = SIZE, first_bytes
        else:
            between_bytes = resident_bytes(between)
        larger_bytes = resident_bytes(larger)
        slope = (larger_bytes - between_bytes) / (tensor_bytes(larger) - tensor_bytes(between))
        gaps = round(min(max(slope - 1, 0.0), MOST_GAPS), 3)
        return gaps, max(
            larger_bytes - (1 + gaps) * tensor_bytes(larger),
            between_bytes - (1 + gaps) * tensor_bytes(between),
        )

    def large(size: tuple[int, int]) -> bool:
        return tensor_bytes(size) - tensor_bytes(SIZE) >= LARGER_BYTES

    def is_square(size: tuple[int, int]) -> bool:
        return tensor_bytes(size) >= SQUARE * tensor_bytes((size[0], size[1] // BETWEEN))

    first_bytes, gaps, held_bytes = resident_bytes(SIZE), ARENA_GAPS, 0.0
    shorter = ((rows, min(length, max_length)) for rows, length in LARGER)
    sizes = [size for size in shorter if large(size)]
    if sizes:
        small = (size for size in sizes if tensor_bytes(size) <= LARGEST_BYTES)
        third = THIRD[0], min(THIRD[1], max_length)
        is_whole = role not in (STAGES, FORWARD, STREAMED)
        tells = is_whole and tensor_bytes(third) - tensor_bytes(SIZE) >= THIRD_BYTES
        gaps, held_bytes = line(third if tells else next(small, min(sizes, key=tensor_bytes)))
        longer = []
        if length_unit > 1:
            longer = [RECORDING]
        elif max_length >= TEXT[1] and is_square(TEXT):
            longer = [TEXT]
        for size in longer:
            if large(size) and tensor_bytes(size) <= LARGEST_BYTES:
                gaps, held_bytes = max((gaps, held_bytes), line(size))
    # Some graphs take more for the smallest batch than a line through the others says: it runs between.
    small_bytes = first_bytes - (1 + gaps) * tensor_bytes(SIZE)
    session_bytes = held_bytes + max(small_bytes - held_bytes, 0.0) / 2 if sizes else small_bytes
    return dataclasses.replace(tensors, arena_gaps=gaps, session_bytes=max(int(session_bytes), 0))


def sample_run(model: StreamedModel, manifest: Manifest, feeds: Mapping[str, np.ndarray], past: int) -> None:
    """Run streamed inference: every stage, and the logits of the last position.

    Args:
        model: of the manifest's bundle, with an adapter's inputs bound.
        feeds: at least the model's inputs, the mask as long as what is cached and the tokens together.
        past: tokens that the cache is to hold already.
    """
    batch = {name: feeds[name] for name in model_inputs(manifest, manifest.graphs["inference"].inputs)}
    rows, *rest = next(iter(batch.values())).shape
    cache = model.new_cache(rows, past + rest[0])
    if cache is None:
        model.forward(batch)
        return
    cache.length = past
    model.next_logits(batch, cache)


def main() -> None:
    """Print a number of bytes."""
    bundle, role = open_bundle(sys.argv[1]), sys.argv[2]
    sizes = axis_sizes(int(sys.argv[3]), int(sys.argv[4]))
    renew_shared_arena(int((1 + ARENA_GAPS) * int(sys.argv[5])))  # as large as a plan would say
    if role in (STAGES, FORWARD):
        print(_chain_bytes(bundle, role, sizes))
    elif role == STREAMED:
        print(_streamed_bytes(bundle, sizes))
    else:
        print(_graph_bytes(bundle, role, sizes))


def _chain_bytes(bundle: Bundle, role: str, sizes: dict[str, int]) -> int:
    from edgepeft.runtime.training.gradients.chain import Chain
    from edgepeft.runtime.training.state.buffers import TrainingState

    inputs = sample_adapter(bundle.manifest, RANK)
    state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
    batch = sample_batch(bundle.manifest, sizes)
    peak = PeakMemory()  # which has the weights that are mapped at once
    before_bytes = peak.look().resident_bytes
    chain = Chain(bundle, {**inputs, **state.parameters})
    if role == STAGES:
        chain.gradients(batch, state)
    else:
        chain.evaluate(batch)
    return peak.nbytes - before_bytes


def _streamed_bytes(bundle: Bundle, sizes: dict[str, int]) -> int:
    feeds = sample_feeds(bundle.manifest.graphs["inference"], sizes, rank=RANK)
    streamed = bundle.manifest.streamed_inference
    assert streamed is not None
    model = StreamedModel(bundle)
    model.bind(feeds)
    peak = PeakMemory()
    before_bytes = peak.look().resident_bytes
    sample_run(model, bundle.manifest, feeds, past=0)
    own_bytes = cache_bytes(bundle.manifest, streamed, sizes["batch"], sizes["sequence"])
    return peak.nbytes - before_bytes - own_bytes


def _graph_bytes(bundle: Bundle, role: str, sizes: dict[str, int]) -> int:
    from edgepeft.runtime.session import GraphSession, open_whole

    feeds = sample_feeds(bundle.manifest.graphs[role], sizes, rank=RANK)
    before_bytes = read_memory().resident_bytes
    # The inference graph's formula is also that of training, which opens it as it comes.
    if is_decoder(bundle.manifest, role):
        session = open_whole(bundle, role)
    else:
        trains = role in _trained_graphs(bundle.manifest)
        session = GraphSession(bundle, role, shared_arena=True, exact_products=trains)
    session.bind(feeds)
    session.run_for(list(session.outputs))
    return read_memory().resident_bytes - before_bytes


def _trained_graphs(manifest: Manifest) -> set[str | None]:
    """Graphs that compute gradients."""
    return {strategy.graph for strategy in manifest.strategies}


if __name__ == "__main__":
    main()
