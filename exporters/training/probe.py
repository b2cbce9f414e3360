"""Measure what loading a graph costs: run in a process of its own, by `measure_session_bytes`.

    python -m edgepeft.exporters.training.probe BUNDLE ROLE UNIT

opens the bundle as a device does, runs the graph (with the role `stages`, the chain of stages, with `forward`
its forward part, with `streamed` streamed inference) once on a small input, whose length is a multiple of
UNIT, and prints how much resident memory that added, in bytes.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgepeft.bundle.manifest import Manifest, MemoryFormula
from edgepeft.errors import ExportError
from edgepeft.runtime.cache import cache_bytes
from edgepeft.runtime.inputs import model_inputs
from edgepeft.runtime.streamed import StreamedModel

from .feeds import axis_sizes, sample_adapter, sample_batch, sample_feeds

#: Sizes of the run that is measured, the sequence in units.
BATCH, SEQUENCE, RANK = 6, 4, 1
#: Stand for the chain of stages, for its forward part and for streamed inference, where a graph's role is
#: asked for.
STAGES, FORWARD, STREAMED = "stages", "forward", "streamed"


def measure_session_bytes(bundle: Path, role: str, tensors: MemoryFormula, length_unit: int = 1) -> int:
    """Resident bytes that graph `role` of the bundle at `bundle` adds to a process, tensors of a run left
    out.

    Args:
        bundle: its folder.
        role: the graph's key in the manifest, `STAGES`, `FORWARD` or `STREAMED`.
        tensors: what a run of the graph holds; the session's arena keeps it, so it is taken off.
        length_unit: the sequence of the run is a multiple of it.

    Raises:
        ExportError: the process failed.
    """
    command = [sys.executable, "-m", "edgepeft.exporters.training.probe", str(bundle), role, str(length_unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"measuring the graph {role!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    run_bytes = tensors.activation_bytes(BATCH, SEQUENCE * length_unit, RANK)
    return max(int(json.loads(done.stdout)["resident_bytes"]) - run_bytes, 0)


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
    """Print `{"resident_bytes": …}`."""
    from edgepeft.bundle.reader import open_bundle
    from edgepeft.runtime.memory.process import read_memory, reset_peak
    from edgepeft.runtime.session import GraphSession

    bundle = open_bundle(sys.argv[1])
    role = sys.argv[2]
    sizes = axis_sizes(BATCH, SEQUENCE * int(sys.argv[3]))
    before = read_memory().resident_bytes
    mapped = 0
    if role in (STAGES, FORWARD):
        from edgepeft.runtime.memory.chain_cost import largest_stage_bytes
        from edgepeft.runtime.training.buffers import TrainingState
        from edgepeft.runtime.training.chain import Chain

        inputs = sample_adapter(bundle.manifest, RANK)
        state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
        batch = sample_batch(bundle.manifest, sizes)
        assert bundle.manifest.partition is not None
        mapped = largest_stage_bytes(bundle.manifest, bundle.manifest.partition)
        before = read_memory().resident_bytes
        chain = Chain(bundle, {**inputs, **state.parameters})
        if role == STAGES:
            chain.gradients(batch, state)
        else:
            chain.evaluate(batch)
    elif role == STREAMED:
        feeds = sample_feeds(bundle.manifest.graphs["inference"], sizes, rank=RANK)
        streamed = bundle.manifest.streamed_inference
        assert streamed is not None
        model = StreamedModel(bundle)
        model.bind(feeds)
        # The kernel's own peak has the weights that are mapped at once.
        resettable = reset_peak()
        before = read_memory().resident_bytes
        sample_run(model, bundle.manifest, feeds, past=0)
        mapped = -cache_bytes(bundle.manifest, streamed, BATCH, sizes["sequence"])
        mapped += read_memory().peak_bytes - read_memory().resident_bytes if resettable else 0
    else:
        feeds = sample_feeds(bundle.manifest.graphs[role], sizes, rank=RANK)
        session = GraphSession(bundle, role)
        session.bind(feeds)
        session.run_for(list(session.outputs))
    after = read_memory().resident_bytes
    print(json.dumps({"resident_bytes": after - before + mapped}))


if __name__ == "__main__":
    main()
