"""Measure what streamed inference needs, as a formula of batch, sequence, rank and what the cache holds."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.wiring import Stage, StreamedInference
from edgepeft.files import temporary_folder
from edgepeft.runtime.key_value_cache import cache_specs
from edgepeft.runtime.streamed_model import StreamedModel, output_rows

from .feeds import axis_sizes, sample_feeds
from .probe import sample_run
from .tensors import Grid, Peaks, fit_peaks, grid_of, read_profile

#: Lengths of the cache on the grid of sizes: what a run holds is linear in them.
PASTS = (3, 8)


def measure_streamed_peaks(folder: Path, length_unit: int = 1) -> Peaks:
    """The sums of live tensors of the streamed inference of the bundle in `folder` that are the largest for
    some batch, sequence, rank and cache; sequences are multiples of `length_unit`."""
    bundle = open_bundle(folder)
    streamed = bundle.manifest.streamed_inference
    assert streamed is not None
    grid = grid_of(bundle.manifest.graphs["inference"])
    if cache_specs(bundle.manifest):
        grid = dataclasses.replace(grid, pasts=PASTS)
    short = _one_of_each_kind(bundle.manifest, streamed)
    in_use = np.hstack(list(_bytes_in_use(bundle, short, grid, length_unit)))
    return fit_peaks(in_use, grid, length_unit)


def _bytes_in_use(
    bundle: Bundle, streamed: StreamedInference, grid: Grid, length_unit: int
) -> Iterator[np.ndarray]:
    """For every graph, what is held after each of its nodes: bytes, float64 `[sizes, nodes]`."""
    with temporary_folder() as scratch:
        model = StreamedModel(bundle, 1, streamed=streamed, profile=str(scratch / "profile"))
        for batch, sequence, rank, past in grid.sizes:
            sizes = axis_sizes(batch, sequence * length_unit)
            sizes["total_sequence"] += past
            feeds = sample_feeds(bundle.manifest.graphs["inference"], sizes, rank)
            model.bind(feeds)
            # Twice: a session keeps what was bound to it in its last run.
            sample_run(model, bundle.manifest, feeds, past)
            sample_run(model, bundle.manifest, feeds, past)
        for path in model.end_profiles().values():
            yield read_profile(path, 2 * len(grid.sizes))[1::2]
        model.close()


def _one_of_each_kind(manifest: Manifest, streamed: StreamedInference) -> StreamedInference:
    """One stage of each kind, since nothing is kept from stage to stage but what the next is given; all
    where that has a size of its own (a recording's frames). Of an output layer two slices."""
    kinds: dict[str, Stage] = {}
    for stage in streamed.stages:
        kinds.setdefault(stage.forward, stage)
        hidden = next(item for item in manifest.graphs[stage.forward].outputs if item.name == "hidden.out")
        if any(isinstance(dim, str) and dim not in ("batch", "sequence") for dim in hidden.shape):
            return streamed
    layer = streamed.output_layer
    if layer is not None:
        width = next(item.shape[-1] for item in manifest.graphs[layer.graph].inputs if item.name == "hidden")
        layer = dataclasses.replace(layer, rows=min(layer.rows, 2 * output_rows(int(width))))
    return dataclasses.replace(streamed, stages=tuple(kinds.values()), output_layer=layer)
