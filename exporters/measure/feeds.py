"""Inputs of any size for a graph of a bundle, to measure it with."""

from collections.abc import Mapping

import numpy as np

from edgepeft.bundle.manifest import LABELS, GraphSpec, Manifest
from edgepeft.bundle.wiring import SEQLENS, TOTAL
from edgepeft.slots import SIZE_AXIS

SAMPLE_LABELS = 8
"""Labels of a classifier that is measured; its head is small whatever their number."""


def sample_adapter(manifest: Manifest, rank: int) -> dict[str, np.ndarray]:
    """Ones for every adapter input, each slot of this rank."""
    specs = {spec.name: spec for spec in manifest.graphs["inference"].inputs}
    sizes = {LABELS: len(manifest.model.labels)}
    return {
        name: np.ones(_resolve(specs[name].shape, sizes, rank), np.float32)
        for name in manifest.adapter_inputs
    }


def sample_batch(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Ones for the model inputs and the labels of the training graph."""
    spec = manifest.graphs["train"]
    adapter = sample_adapter(manifest, 1)
    sizes = {**sizes, LABELS: len(manifest.model.labels)}
    return {
        item.name: np.ones(_resolve(item.shape, sizes, 1), item.dtype)
        for item in spec.inputs
        if item.name not in adapter
    }


def axis_sizes(batch: int, sequence: int) -> dict[str, int]:
    """The symbolic axes of any graph, with an empty cache and a decoder's input as long as the encoder's."""
    return {
        "batch": batch,
        "sequence": sequence,
        "decoder_sequence": sequence,
        "total_sequence": sequence,
        "past_sequence": 0,
        "capacity": sequence,
        LABELS: SAMPLE_LABELS,
    }


def sample_feeds(spec: GraphSpec, sizes: Mapping[str, int], rank: int) -> dict[str, np.ndarray]:
    """Ones for every input: a token, an attended position, a counted label and an adapter's value at once.

    Args:
        sizes: sizes of the symbolic axes, by name.
        rank: size of the rank axis of every slot.
    """
    feeds = {item.name: np.ones(_resolve(item.shape, sizes, rank), item.dtype) for item in spec.inputs}
    if SEQLENS in feeds:  # the decoder graph is told how many tokens its cache holds after the run
        feeds[SEQLENS][:] = sizes["total_sequence"] - 1
        feeds[TOTAL][:] = sizes["total_sequence"]
    return feeds


def _resolve(shape: tuple[int | str, ...], sizes: Mapping[str, int], rank: int) -> tuple[int, ...]:
    return tuple(
        dim if isinstance(dim, int) else rank if dim.startswith(SIZE_AXIS) else sizes[dim] for dim in shape
    )
