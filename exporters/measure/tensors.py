"""Measure what a graph's tensors need, as a formula of batch, sequence and rank.

onnxruntime's profiler reports the bytes requested and in use after every node. At a grid of small sizes each
node's figure is a polynomial of the sizes, so solving for the coefficients gives the exact amount at any
size; the nodes that are the worst for some size make the formula.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgepeft.bundle.manifest import GraphSpec
from edgepeft.bundle.memory_formula import MemoryTerm
from edgepeft.errors import ExportError
from edgepeft.files import temporary_folder
from edgepeft.runtime.session import FOLDING, MERGING

from .feeds import axis_sizes, sample_feeds

#: Grid of sizes; an axis needs one size more than its highest power. Batches are even: some losses split
#: them in two. A graph without an axis `sequence` (images) is measured at one.
BATCHES, SEQUENCES, RANKS = (2, 4, 6), (4, 7, 10), (1, 3)
#: Sizes among which the worst nodes are looked for.
BATCHES_SOUGHT, SEQUENCES_SOUGHT, RANKS_SOUGHT = (1, 4, 16, 64), (16, 64, 256, 1024, 4096), (1, 8, 64)
PASTS_SOUGHT = (0, 64, 1024, 8192)
SHAPE_ERROR_BYTES = 1.0
_TIME, _HELD = re.compile(rb'"ts" ?: ?(\d+)'), re.compile(rb'"mem_bytes_requested_in_use" ?: ?"(\d+)"')
_WITH_SCRATCH = (b'"Attention"', b'"GroupQueryAttention"')

Peaks = tuple[tuple[MemoryTerm, ...], ...]
#: Batch, sequence, rank and length of the cache; or the powers of these.
Size = tuple[int, int, int, int]


def measure_peaks(
    graph: bytes, spec: GraphSpec, folder: Path, length_unit: int = 1, batch_unit: int = 1
) -> Peaks:
    """The sums of live tensors that are the largest for some batch, sequence and rank.

    Args:
        graph: the ONNX file.
        spec: its signature.
        folder: where its external data is.
        length_unit: sequences are multiples of it: the frames of a waveform are a quotient that rounds down,
            and polynomials of its length only there.
        batch_unit: batches are multiples of it: some losses split them.

    Raises:
        ExportError: the graph does not run.
    """
    grid = grid_of(spec, batch_unit)
    few = dataclasses.replace(grid, is_sparse=True)

    def at(sizes: Sequence[Size]) -> np.ndarray:
        runs = [
            sample_feeds(spec, axis_sizes(batch, sequence * length_unit), rank)
            for batch, sequence, rank, _ in sizes
        ]
        return bytes_in_use(graph, folder, runs, folds=spec.folds)

    try:
        last = grid.sizes[-1]
        in_use = at([*few.sizes, last])
        if few.foretells(in_use[:-1], last, in_use[-1]):
            return fit_peaks(in_use[:-1], few, length_unit)
        in_use = at(grid.sizes)
    except Exception as error:  # onnxruntime's are of several kinds
        raise ExportError(
            f"{spec.file}: onnxruntime {ort.__version__} does not run this graph, whose memory was to be "
            f"measured ({' '.join(str(error).split())[:300]}): report the operator that it names; if it is a "
            "graph of training, --no-train leaves it out"
        ) from error
    return fit_peaks(in_use, grid, length_unit)


def bytes_in_use(
    graph: bytes, folder: Path, runs: Sequence[Mapping[str, np.ndarray]], *, folds: bool = False
) -> np.ndarray:
    """Run a graph and read what it holds after each node: bytes, float64 `[runs, nodes]`; `folds` as
    `GraphSpec` has it."""
    with temporary_folder() as scratch:
        session = _profiled_session(graph, folder, scratch, folds)
        for feeds in runs:
            session.run(None, dict(feeds))
        return read_profile(Path(session.end_profiling()), len(runs))


def fit_peaks(in_use: np.ndarray, grid: "Grid", length_unit: int = 1) -> Peaks:
    """Formulas of the nodes that hold the most for some size.

    Args:
        in_use: bytes after each node, float64 `[sizes, nodes]`, in the order of the grid's sizes.
        grid: the sizes.
        length_unit: of the grid's sequences.
    """
    coefficients = grid.coefficients(in_use).T  # [nodes, powers]
    coefficients[np.abs(coefficients) < SHAPE_ERROR_BYTES] = 0.0
    # What is in use at every size are initializers and prepacked weights, which the session itself accounts
    # for.
    coefficients[:, 0] -= coefficients[:, 0].min()
    sought = itertools.product(
        BATCHES_SOUGHT,
        SEQUENCES_SOUGHT if len(grid.sequences) > 1 else (1,),
        RANKS_SOUGHT,
        PASTS_SOUGHT if len(grid.pasts) > 1 else grid.pasts,
    )
    worst = sorted(set(np.argmax(coefficients @ grid.design(list(sought)).T, axis=0).tolist()))
    return tuple(
        tuple(
            MemoryTerm(float(f"{value / length_unit**j:.9g}"), i, j, k, m)
            for value, (i, j, k, m) in zip(coefficients[node], grid.powers, strict=True)
            if value > 0  # a slice that is shorter by a constant counts in full
        )
        for node in worst
    )


def read_profile(path: Path, runs: int) -> np.ndarray:
    """Bytes in use after each node, float64 `[runs, nodes]` in order of execution, from a profile.

    A profile has an event a line, most of it of threads and times: only what is asked for is parsed.
    """
    used = []
    for line in path.read_bytes().splitlines():
        if b'_kernel_time"' in line:
            time, held = _TIME.search(line), _HELD.search(line)
            assert time is not None
            assert held is not None
            scratch = 0
            if any(name in line for name in _WITH_SCRATCH):
                scratch = _scratch_bytes(json.loads(line.rstrip(b","))["args"])
            used.append((int(time[1]), int(held[1]) + scratch))
    used.sort(key=lambda event: event[0])
    return np.array([held for _, held in used], np.float64).reshape(runs, -1)


def grid_of(spec: GraphSpec, batch_unit: int = 1) -> "Grid":
    """Sizes that determine the polynomials of a graph; one sequence where it has no such axis."""
    has_sequence = any("sequence" in item.shape for item in spec.inputs)
    batches = tuple(batch_unit * batch for batch in BATCHES)
    return Grid(batches, SEQUENCES if has_sequence else (1,), RANKS)


@dataclass(frozen=True)
class Grid:
    """Sizes that determine a polynomial of batch, sequence, rank and what the key/value cache holds.

    With `is_sparse` only such monomials have a coefficient as tensors of most models have: a batch counts
    once, a sequence twice at most (scores of attention), and once beside a rank. What a batch counts twice
    for (a loss that compares every text with every other) needs the whole grid.
    """

    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    ranks: tuple[int, ...]
    pasts: tuple[int, ...] = (0,)
    is_sparse: bool = False

    @property
    def sizes(self) -> list[Size]:
        """As many as there are monomials, and such that they determine each."""
        return [
            (self.batches[b], self.sequences[s], self.ranks[r], self.pasts[p]) for b, s, r, p in self.powers
        ]

    @property
    def powers(self) -> list[Size]:
        """Exponents of every monomial."""
        b, s, r, p = (range(len(axis)) for axis in (self.batches, self.sequences, self.ranks, self.pasts))
        every = itertools.product(b, s, r, p)
        return [power for power in every if not self.is_sparse or (power[0] < 2 and power[1] + power[2] < 3)]

    def coefficients(self, values: np.ndarray) -> np.ndarray:
        """Of every monomial, float64 `[powers, columns]`, of what has these values, float64 `[sizes,
        columns]`, at the grid's sizes."""
        return np.linalg.solve(self.design(self.sizes), values)

    def foretells(self, values: np.ndarray, size: Size, there: np.ndarray) -> bool:
        """Whether the polynomials of these values, float64 `[sizes, columns]`, have the values `there`,
        float64 `[columns]`, at one more size."""
        found = self.design([size])[0] @ self.coefficients(values)
        return bool((np.abs(found - there) < SHAPE_ERROR_BYTES).all())

    def design(self, sizes: Sequence[Size]) -> np.ndarray:
        """Every monomial at every size, float64 `[sizes, powers]`."""
        return np.array(
            [[float(b**i * s**j * r**k * p**m) for i, j, k, m in self.powers] for b, s, r, p in sizes]
        )


def _profiled_session(graph: bytes, folder: Path, scratch: Path, folds: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    options.intra_op_num_threads = 1  # other threads would spin beside runs this small
    options.enable_mem_pattern = False  # a plan would request everything at once
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(
        graph,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[MERGING] if folds else [MERGING, FOLDING],
    )


def _scratch_bytes(args: dict[str, Any]) -> int:
    """What a kernel allocates and frees again while it runs, which the profiler's figure after it leaves out.

    `Attention` holds the scores, float32 `[batch, heads, queries, keys]`, and so does `GroupQueryAttention`,
    which has its heads apart as well; the other kernels in use need next to nothing.
    """
    if args["op_name"] not in ("Attention", "GroupQueryAttention"):
        return 0
    shapes = [next(iter(entry.values())) for entry in args["input_type_shape"]]
    if args["op_name"] == "GroupQueryAttention":
        batch, queries, width = shapes[0]
        past = next((shape for shape in shapes if len(shape) == 4), None)
        if past is None:
            return 0
        packed = sum(len(shape) == 3 for shape in shapes) == 1
        heads = width // past[3] - (2 * past[1] if packed else 0)
        apart = (heads + 2 * past[1]) * past[3]
        return int(4 * batch * queries * (heads * (queries + past[2]) + apart))
    query, key = shapes[:2]
    if len(query) != 4:
        return 0
    batch, heads, queries, _ = query
    return int(4 * batch * heads * queries * key[2])
