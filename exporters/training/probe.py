"""Measure what running a graph costs: in a process of its own, by `with_session`.

    python -m edgepeft.exporters.training.probe BUNDLE ROLE SIZES

opens the bundle as a device does, runs the graph (with the role `stages`, the chain of stages, with `forward`
its forward part, with `streamed` streamed inference) once at each of SIZES, a JSON list of batch and
length, and prints how much resident memory the process had more after each, in bytes.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgepeft.bundle.manifest import Manifest, MemoryFormula
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import ExportError
from edgepeft.runtime.cache import cache_bytes
from edgepeft.runtime.inputs import model_inputs
from edgepeft.runtime.streamed import StreamedModel

from .feeds import axis_sizes, sample_adapter, sample_batch, sample_feeds

#: Batch and sequence, in units, of the run that tells what a session takes, and of runs that tell what gaps
#: an arena has: the first of those whose tensors are so much larger.
SIZE, LARGER, LARGER_BYTES = (6, 4), ((6, 64), (18, 64)), 16 * 2**20
RANK = 1
#: Gaps where no run is large enough to tell: on MiniLM, six sizes of batches from 2 x 32 to 32 x 16 had 0.07
#: to 0.12.
ARENA_GAPS, MOST_GAPS = 0.12, 0.5
#: Stand for the chain of stages, for its forward part and for streamed inference, where a graph's role is
#: asked for.
STAGES, FORWARD, STREAMED = "stages", "forward", "streamed"


def with_session(bundle: Path, role: str, tensors: MemoryFormula, length_unit: int = 1) -> MemoryFormula:
    """The formula of graph `role` of the bundle at `bundle`, with what the session and the arena's gaps take.

    Args:
        bundle: its folder.
        role: the graph's key in the manifest, `STAGES`, `FORWARD` or `STREAMED`.
        tensors: what a run of the graph holds. The session's arena keeps it.
        length_unit: the sequence of a run is a multiple of it.

    Raises:
        ExportError: the process failed.
    """

    def tensor_bytes(size: tuple[int, int]) -> int:
        return tensors.activation_bytes(size[0], size[1] * length_unit, RANK)

    sizes = [SIZE, *(size for size in LARGER if tensor_bytes(size) - tensor_bytes(SIZE) >= LARGER_BYTES)][:2]
    lengths = [(batch, sequence * length_unit) for batch, sequence in sizes]
    arguments = [str(bundle), role, json.dumps(lengths)]
    command = [sys.executable, "-m", "edgepeft.exporters.training.probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"measuring the graph {role!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    resident = [int(item) for item in json.loads(done.stdout)]
    gaps = ARENA_GAPS
    if len(sizes) > 1:
        gaps = (resident[1] - resident[0]) / (tensor_bytes(sizes[1]) - tensor_bytes(SIZE)) - 1
        gaps = round(min(max(gaps, 0.0), MOST_GAPS), 3)
    session_bytes = max(resident[0] - int((1 + gaps) * tensor_bytes(SIZE)), 0)
    return dataclasses.replace(tensors, session_bytes=session_bytes, arena_gaps=gaps)


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
    """Print a JSON list of bytes."""
    from edgepeft.runtime.memory.process import read_memory

    bundle = open_bundle(sys.argv[1])
    role, sizes = sys.argv[2], [axis_sizes(*size) for size in json.loads(sys.argv[3])]
    if role in (STAGES, FORWARD):
        runs = _chain_runs(bundle, role, sizes)
    elif role == STREAMED:
        runs = _streamed_runs(bundle, sizes)
    else:
        runs = _graph_runs(bundle, role, sizes)
    before_bytes = next(runs)
    print(json.dumps([read_memory().resident_bytes + beside_bytes - before_bytes for beside_bytes in runs]))


def _chain_runs(bundle: Bundle, role: str, sizes: Sequence[dict[str, int]]) -> Iterator[int]:
    """Yields what the process has before, and then, after each run, what to add to what it has."""
    from edgepeft.runtime.memory.chain_cost import largest_stage_bytes
    from edgepeft.runtime.memory.process import read_memory
    from edgepeft.runtime.training.buffers import TrainingState
    from edgepeft.runtime.training.chain import Chain

    inputs = sample_adapter(bundle.manifest, RANK)
    state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
    batches = [sample_batch(bundle.manifest, size) for size in sizes]
    assert bundle.manifest.partition is not None
    mapped_bytes = largest_stage_bytes(bundle.manifest, bundle.manifest.partition)
    yield read_memory().resident_bytes
    chain = Chain(bundle, {**inputs, **state.parameters})
    for batch in batches:
        if role == STAGES:
            chain.gradients(batch, state)
        else:
            chain.evaluate(batch)
        yield mapped_bytes


def _streamed_runs(bundle: Bundle, sizes: Sequence[dict[str, int]]) -> Iterator[int]:
    from edgepeft.runtime.memory.process import read_memory, reset_peak

    feeds = [sample_feeds(bundle.manifest.graphs["inference"], size, rank=RANK) for size in sizes]
    streamed = bundle.manifest.streamed_inference
    assert streamed is not None
    model = StreamedModel(bundle)
    # The kernel's own peak has the weights that are mapped at once.
    resettable = reset_peak()
    yield read_memory().resident_bytes
    for size, given in zip(sizes, feeds, strict=True):
        model.bind(given)
        sample_run(model, bundle.manifest, given, past=0)
        memory = read_memory()
        mapped_bytes = memory.peak_bytes - memory.resident_bytes if resettable else 0
        yield mapped_bytes - cache_bytes(bundle.manifest, streamed, size["batch"], size["sequence"])


def _graph_runs(bundle: Bundle, role: str, sizes: Sequence[dict[str, int]]) -> Iterator[int]:
    from edgepeft.runtime.memory.process import read_memory
    from edgepeft.runtime.session import GraphSession

    feeds = [sample_feeds(bundle.manifest.graphs[role], size, rank=RANK) for size in sizes]
    yield read_memory().resident_bytes
    session = GraphSession(bundle, role)
    for given in feeds:
        session.bind(given)
        session.run_for(list(session.outputs))
        yield 0


if __name__ == "__main__":
    main()
