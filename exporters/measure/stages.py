"""Measure what a chain of stages needs, as a formula of batch, sequence and rank."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from edgepeft.bundle.manifest import GraphSpec
from edgepeft.bundle.memory_formula import MemoryTerm
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.wiring import Partition, Stage
from edgepeft.files import temporary_folder
from edgepeft.runtime.memory.plan import Held
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.gradients.sliced_head import slice_rows
from edgepeft.runtime.training.state.buffers import TrainingState

from .feeds import axis_sizes, sample_adapter, sample_batch
from .tensors import Peaks, fit_peaks, grid_of, read_profile

_POWERS = {"batch": (1, 0), "sequence": (0, 1)}


def measure_chain_peaks(
    folder: Path, length_unit: int = 1, batch_unit: int = 1, *, backward: bool = True
) -> Peaks:
    """The sums of live tensors of a bundle's chain that are the largest for some batch, sequence and rank.

    One stage of each kind runs, and the topmost that keeps anything for its backward pass is held; what the
    others hand on is added, unless the pass ends without going `backward`. Sequences are multiples of
    `length_unit`, batches of `batch_unit`.
    """
    bundle = open_bundle(folder)
    partition = bundle.manifest.partition
    assert partition is not None
    short = _shortened(bundle, partition)
    kept = _kept_terms(bundle, partition, short) if backward else ()
    in_use = []
    grid = grid_of(bundle.manifest.graphs["train"], batch_unit)
    for rank in grid.ranks:
        inputs = sample_adapter(bundle.manifest, rank)
        state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
        with temporary_folder() as scratch:
            chain = Chain(
                bundle,
                {**inputs, **state.parameters},
                threads=1,
                held=_topmost(short),
                partition=short,
                profile=str(scratch / "profile"),
            )
            for batch, sequence in itertools.product(grid.batches, grid.sequences):
                feeds = sample_batch(bundle.manifest, axis_sizes(batch, sequence * length_unit))
                for _ in range(2):  # a session keeps what was bound to it in its last run
                    if backward:
                        chain.gradients(feeds, state)
                    else:
                        chain.evaluate(feeds)
            runs = 2 * len(grid.batches) * len(grid.sequences)
            profiles = chain.end_profiles()
            in_use.append(np.hstack([read_profile(path, runs)[1::2] for path in profiles.values()]))
            chain.close()
    by_size = np.stack(in_use, axis=1).reshape(len(grid.sizes), -1)
    return tuple((*terms, *kept) for terms in fit_peaks(by_size, grid, length_unit))


def _shortened(bundle: Bundle, partition: Partition) -> Partition:
    """One stage of each kind, and a head of two slices; all stages where what they hand on has a size of its
    own (a recording's frames)."""
    shapes = [_handed_on(bundle, stage) for stage in partition.stages]
    if any(isinstance(dim, str) and dim not in _POWERS for shape in shapes for dim in shape):
        return partition
    kinds: dict[str, Stage] = {}
    for stage in partition.stages:
        kinds.setdefault(stage.forward, stage)
    # The first stage of a kind may lie below all that trains and its backward graph still be another's.
    backward = {stage.forward: stage.backward for stage in partition.stages if stage.backward}
    stages = tuple(
        dataclasses.replace(stage, backward=backward.get(stage.forward)) for stage in kinds.values()
    )
    head = partition.vocabulary_head
    if head is not None:
        spec = bundle.manifest.graphs[head.scan]
        rows = min(head.rows, 2 * slice_rows(_width(spec)))
        head = dataclasses.replace(head, rows=rows)
    return dataclasses.replace(partition, stages=stages, vocabulary_head=head)


def _topmost(partition: Partition) -> Held:
    """The last stages down to one that keeps anything: of what more are held, that is the part which is there
    in any case, when the stage's own backward graph runs."""
    keeps = [stage.output is not None for stage in reversed(partition.stages)]
    return Held(stages=keeps.index(True) + 1 if any(keeps) else 0)


def _handed_on(bundle: Bundle, stage: Stage) -> tuple[int | str, ...]:
    """The shape of what a stage gives to the next."""
    outputs = bundle.manifest.graphs[stage.output or stage.forward].outputs
    return next(item.shape for item in outputs if item.name == "hidden.out")


def _width(spec: GraphSpec) -> int:
    hidden = next(item for item in spec.inputs if item.name == "hidden")
    return int(hidden.shape[-1])


def _kept_terms(bundle: Bundle, partition: Partition, short: Partition) -> tuple[MemoryTerm, ...]:
    """What the stages that `short` leaves out hand on to the next."""
    left = list(partition.stages)
    for stage in short.stages:
        left.remove(next(other for other in left if other.forward == stage.forward))
    total: dict[tuple[int, int], float] = {}
    for stage in left:
        powers, values = (0, 0), 1
        for dim in _handed_on(bundle, stage):
            if isinstance(dim, int):
                values *= dim
            else:
                batch, sequence = _POWERS[dim]
                powers = powers[0] + batch, powers[1] + sequence
        total[powers] = total.get(powers, 0.0) + 4.0 * values
    return tuple(MemoryTerm(value, batch, sequence) for (batch, sequence), value in total.items())
