"""Measure what a graph's tensors need, as a formula of batch, sequence and rank.

onnxruntime's profiler reports the bytes requested and in use after every node. At a grid of small sizes each
node's figure is a polynomial of the sizes, so solving for the coefficients gives the exact amount at any
size; the nodes that are the worst for some size make the formula.
"""

import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgepeft.bundle.manifest import GraphSpec, MemoryTerm

from .feeds import axis_sizes, sample_feeds

#: Grid of sizes; an axis needs one size more than its highest power. Batches are even: some losses split
#: them in two. A graph without an axis `sequence` (images) is measured at one.
BATCHES, SEQUENCES, RANKS = (2, 4, 6), (4, 7, 10), (1, 3)
#: Sizes among which the worst nodes are looked for.
BATCHES_SOUGHT, SEQUENCES_SOUGHT, RANKS_SOUGHT = (1, 4, 16, 64), (16, 64, 256, 1024, 4096), (1, 8, 64)
SHAPE_ERROR_BYTES = 1.0


def measure_peaks(
    graph: bytes, spec: GraphSpec, folder: Path, length_unit: int = 1
) -> tuple[tuple[MemoryTerm, ...], ...]:
    """The sums of live tensors that are the largest for some batch, sequence and rank.

    Args:
        graph: the ONNX file.
        spec: its signature.
        folder: where its external data is.
        length_unit: sequences are multiples of it: the frames of a waveform are a quotient that rounds down,
            and polynomials of its length only there.
    """
    has_sequence = any("sequence" in item.shape for item in spec.inputs)
    grid = _Grid(BATCHES, SEQUENCES if has_sequence else (1,), RANKS)
    session, close = _profiled_session(graph, folder)
    for batch, sequence, rank in grid.sizes:
        session.run(None, sample_feeds(spec, axis_sizes(batch, sequence * length_unit), rank))
    in_use = close(len(grid.sizes))
    coefficients = np.linalg.solve(grid.design(grid.sizes), in_use).T  # [nodes, powers]
    coefficients[np.abs(coefficients) < SHAPE_ERROR_BYTES] = 0.0
    # What is in use at every size are initializers and prepacked weights, which the session itself accounts
    # for.
    coefficients[:, 0] -= coefficients[:, 0].min()
    sought = itertools.product(BATCHES_SOUGHT, SEQUENCES_SOUGHT if has_sequence else (1,), RANKS_SOUGHT)
    worst = sorted(set(np.argmax(coefficients @ grid.design(list(sought)).T, axis=0).tolist()))
    return tuple(
        tuple(
            MemoryTerm(bytes=float(f"{value / length_unit**j:.9g}"), batch_power=i, seq_power=j, rank_power=k)
            for value, (i, j, k) in zip(coefficients[node], grid.powers, strict=True)
            if value > 0  # a slice that is shorter by a constant counts in full
        )
        for node in worst
    )


@dataclass(frozen=True)
class _Grid:
    """Sizes that determine a polynomial of batch, sequence and rank."""

    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        return list(itertools.product(self.batches, self.sequences, self.ranks))

    @property
    def powers(self) -> list[tuple[int, int, int]]:
        return list(
            itertools.product(range(len(self.batches)), range(len(self.sequences)), range(len(self.ranks)))
        )

    def design(self, sizes: list[tuple[int, int, int]]) -> np.ndarray:
        """Every monomial at every size, float64 `[sizes, powers]`."""
        return np.array([[float(b**i * s**j * r**k) for i, j, k in self.powers] for b, s, r in sizes])


def _profiled_session(graph: bytes, folder: Path) -> tuple[ort.InferenceSession, Callable[[int], np.ndarray]]:
    """A session, and what ends its profile of so many runs: bytes in use, float64 `[runs, nodes]` in order of
    execution."""
    scratch = tempfile.TemporaryDirectory(prefix="edgepeft-profile-")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(scratch.name) / "profile")
    options.enable_mem_pattern = False  # a plan would request everything at once
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )

    def close(runs: int) -> np.ndarray:
        profile = Path(session.end_profiling())
        events = json.loads(profile.read_text())
        scratch.cleanup()
        used = [
            int(event["args"]["mem_bytes_requested_in_use"]) + _scratch_bytes(event["args"])
            for event in sorted(events, key=lambda event: event["ts"])
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        ]
        return np.array(used, np.float64).reshape(runs, -1)

    return session, close


def _scratch_bytes(args: dict[str, Any]) -> int:
    """What a kernel allocates and frees again while it runs, which the profiler's figure after it leaves out.

    `Attention` holds the scores, float32 `[batch, heads, queries, keys]`; the other kernels in use need next
    to nothing.
    """
    if args["op_name"] != "Attention":
        return 0
    query, key = (next(iter(entry.values())) for entry in args["input_type_shape"][:2])
    if len(query) != 4:
        return 0
    batch, heads, queries, _ = query
    return int(4 * batch * heads * queries * key[2])
