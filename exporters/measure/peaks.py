"""Measure the tensors of a graph: in a process of its own, by `tensor_peaks`.

    python -m edgepeft.exporters.measure.peaks BUNDLE ROLE LENGTH_UNIT BATCH_UNIT

prints the lists of terms of a `MemoryFormula` as JSON. What a session of it holds is then not the exporter's,
and two are measured at a time.
"""

import dataclasses
import json
import sys
from pathlib import Path

from edgepeft.bundle.memory_formula import MemoryTerm
from edgepeft.bundle.reader import open_bundle

from .probe import FORWARD, STAGES, STREAMED
from .processes import Processes
from .stages import measure_chain_peaks
from .streamed_inference import measure_streamed_peaks
from .tensors import Peaks, measure_peaks


def tensor_peaks(
    processes: Processes, folder: Path, role: str, length_unit: int = 1, batch_unit: int = 1
) -> Peaks:
    """The sums of live tensors that are the largest for some batch, sequence and rank.

    Args:
        processes: that measure.
        folder: of the bundle.
        role: the graph's key in the manifest, `STAGES`, `FORWARD` or `STREAMED`.
        length_unit: sequences are multiples of it.
        batch_unit: batches are multiples of it.

    Raises:
        ExportError: the graph does not run.
    """
    printed = processes.output("peaks", folder, role, length_unit, batch_unit)
    return tuple(tuple(MemoryTerm(*term) for term in terms) for terms in json.loads(printed))


def main() -> None:
    """Print the terms."""
    folder, role = Path(sys.argv[1]), sys.argv[2]
    units = int(sys.argv[3]), int(sys.argv[4])
    if role in (STAGES, FORWARD):
        peaks = measure_chain_peaks(folder, *units, backward=role == STAGES)
    elif role == STREAMED:
        peaks = measure_streamed_peaks(folder, units[0])
    else:
        spec = open_bundle(folder).manifest.graphs[role]
        peaks = measure_peaks((folder / spec.file).read_bytes(), spec, folder, *units)
    print(json.dumps([[dataclasses.astuple(term) for term in terms] for terms in peaks]))


if __name__ == "__main__":
    main()
