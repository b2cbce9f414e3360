"""What each graph of a bundle takes in memory, measured for its manifest."""

import dataclasses
import functools
import gc
from pathlib import Path

from edgepeft.bundle.manifest import Manifest, Strategy
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.writer import write_manifest
from edgepeft.runtime.memory.process import release_freed_memory

from .probe import FORWARD, STAGES, with_session
from .stages import measure_chain_peaks
from .streamed_inference import measure_streamed
from .tensors import measure_peaks


def with_memory(manifest: Manifest, folder: Path, length_unit: int) -> Manifest:
    """Measure the graphs; `folder` gets a manifest on the way, since the measuring process opens it as a
    bundle. Sequences that are measured are multiples of `length_unit`."""
    write_manifest(manifest, folder)
    gc.collect()  # what a trace leaves is in circles
    release_freed_memory()
    batch_unit = 3 if manifest.model.loss == "triplet" else 1

    @functools.cache
    def formula(role: str) -> MemoryFormula:
        if role in (STAGES, FORWARD):
            peaks = measure_chain_peaks(folder, length_unit, batch_unit, backward=role == STAGES)
        else:
            spec = manifest.graphs[role]
            peaks = measure_peaks((folder / spec.file).read_bytes(), spec, folder, length_unit, batch_unit)
        tensors = MemoryFormula(session_bytes=0, peaks=peaks)
        release_freed_memory()  # of this session, before a process of its own has the next
        return with_session(folder, role, tensors, length_unit, manifest.model.max_length)

    inference = formula("inference")
    streamed = manifest.streamed_inference
    if streamed is not None:
        streamed = dataclasses.replace(streamed, memory=measure_streamed(folder, length_unit))

    decoder = manifest.decoder
    if decoder is not None:
        int8 = None if decoder.int8_graph is None else formula(decoder.int8_graph)
        decoder = dataclasses.replace(decoder, memory=formula(decoder.graph), int8_memory=int8)

    def measured(strategy: Strategy) -> Strategy:
        if strategy.exact:
            memory = formula(strategy.graph or STAGES)
        else:
            memory = inference if manifest.partition is None else formula(FORWARD)
        return dataclasses.replace(strategy, memory=memory)

    return dataclasses.replace(
        manifest,
        inference_memory=inference,
        streamed_inference=streamed,
        decoder=decoder,
        strategies=tuple(measured(strategy) for strategy in manifest.strategies),
    )
