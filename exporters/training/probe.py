"""Measure what loading a graph costs: run in a process of its own, by `measure_session_bytes`.

    python -m edgepeft.exporters.training.probe BUNDLE ROLE UNIT

opens the bundle as a device does, runs the graph (with the role `stages`, the chain of stages, with `forward`
its forward part) once on a small input, whose length is a multiple of UNIT, and prints how much resident
memory that added, in bytes.
"""

import json
import subprocess
import sys
from pathlib import Path

from edgepeft.bundle.manifest import MemoryFormula
from edgepeft.errors import ExportError

from .feeds import axis_sizes, sample_adapter, sample_batch, sample_feeds

#: Sizes of the run that is measured, the sequence in units.
BATCH, SEQUENCE, RANK = 6, 4, 1
#: Stand for the chain of stages, and for its forward part, where a graph's role is asked for.
STAGES, FORWARD = "stages", "forward"


def measure_session_bytes(bundle: Path, role: str, tensors: MemoryFormula, length_unit: int = 1) -> int:
    """Resident bytes that graph `role` of the bundle at `bundle` adds to a process, tensors of a run left
    out.

    Args:
        bundle: its folder.
        role: the graph's key in the manifest, `STAGES` or `FORWARD`.
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


def main() -> None:
    """Print `{"resident_bytes": …}`."""
    from edgepeft.bundle.reader import open_bundle
    from edgepeft.runtime.memory.process import read_memory
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
    else:
        feeds = sample_feeds(bundle.manifest.graphs[role], sizes, rank=RANK)
        session = GraphSession(bundle, role)
        session.bind(feeds)
        session.run_for(list(session.outputs))
    after = read_memory().resident_bytes
    print(json.dumps({"resident_bytes": after - before + mapped}))


if __name__ == "__main__":
    main()
