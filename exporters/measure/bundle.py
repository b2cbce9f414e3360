"""What each graph of a bundle takes in memory, measured for its manifest."""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgepeft.bundle.manifest import Manifest, Strategy
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.writer import write_manifest
from edgepeft.runtime.memory.process import release_freed_memory

from .peaks import tensor_peaks
from .probe import FORWARD, STAGES, STREAMED, with_session
from .processes import Processes

#: Graphs that are measured at a time. Opening one and its smallest runs keep one core busy.
AT_ONCE = 2


def with_memory(manifest: Manifest, folder: Path, length_unit: int) -> Manifest:
    """Measure the graphs; `folder` gets a manifest on the way, since the measuring processes open it as a
    bundle. Sequences that are measured are multiples of `length_unit`.

    Raises:
        ExportError: a graph does not run.
    """
    write_manifest(manifest, folder)
    gc.collect()  # what a trace leaves is in circles
    release_freed_memory()
    with ThreadPoolExecutor(AT_ONCE) as pool, Processes() as processes:
        measuring = {
            role: pool.submit(graph_formula, processes, manifest, folder, role, length_unit)
            for role in _roles(manifest)
        }
        found = {role: formula.result() for role, formula in measuring.items()}
    streamed = manifest.streamed_inference
    if streamed is not None:
        streamed = dataclasses.replace(streamed, memory=found[STREAMED])
    decoder = manifest.decoder
    if decoder is not None:
        int8 = None if decoder.int8_graph is None else found[decoder.int8_graph]
        decoder = dataclasses.replace(decoder, memory=found[decoder.graph], int8_memory=int8)
    return dataclasses.replace(
        manifest,
        inference_memory=found["inference"],
        streamed_inference=streamed,
        decoder=decoder,
        strategies=tuple(
            dataclasses.replace(strategy, memory=found[_role(manifest, strategy)])
            for strategy in manifest.strategies
        ),
    )


def graph_formula(
    processes: Processes, manifest: Manifest, folder: Path, role: str, length_unit: int
) -> MemoryFormula:
    """What a graph of the bundle in `folder` takes.

    Args:
        processes: that measure.
        manifest: the bundle's.
        folder: the bundle's.
        role: the graph's key in the manifest, `STAGES`, `FORWARD` or `STREAMED`.
        length_unit: sequences are multiples of it.

    Raises:
        ExportError: the graph does not run.
    """
    batch_unit = 3 if manifest.model.loss == "triplet" and role != STREAMED else 1
    peaks = tensor_peaks(processes, folder, role, length_unit, batch_unit)
    tensors = MemoryFormula(session_bytes=0, peaks=peaks)
    return with_session(processes, folder, role, tensors, length_unit, manifest.model.max_length)


def _roles(manifest: Manifest) -> list[str]:
    """What is measured; first the graph to train, which takes as long as several others and the most memory:
    the next are stages, which take the least."""
    roles = [_role(manifest, strategy) for strategy in manifest.strategies]
    if manifest.streamed_inference is not None:
        roles.append(STREAMED)
    if manifest.decoder is not None:
        roles += [role for role in (manifest.decoder.graph, manifest.decoder.int8_graph) if role is not None]
    return list(dict.fromkeys([*roles, "inference"]))


def _role(manifest: Manifest, strategy: Strategy) -> str:
    """What a way to train runs."""
    if strategy.exact:
        return strategy.graph or STAGES
    return "inference" if manifest.partition is None else FORWARD
