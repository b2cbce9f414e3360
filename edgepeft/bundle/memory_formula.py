"""How much memory a graph takes, as a formula of its sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryTerm:
    """`bytes * batch**batch_power * seq_len**seq_power * rank**rank_power * past**past_power`.

    `past` is the length of the key/value cache that a run begins with.
    """

    bytes: float
    batch_power: int = 0
    seq_power: int = 0
    rank_power: int = 0
    past_power: int = 0


@dataclass(frozen=True)
class MemoryFormula:
    """Bytes one session needs beyond the process it runs in.

    peak = `session_bytes` + (1 + `arena_gaps`) · the maximum over `peaks` of the sum of that list's terms.
    `session_bytes` is what loading the graph costs (nodes, initializers, prepacked copies) and `arena_gaps`
    what onnxruntime's arena leaves between tensors, per byte of them; both are measured at export in a clean
    process. Each list of terms is the sum of the tensors alive at one moment of the run that is the largest
    for some size.
    """

    session_bytes: int
    peaks: tuple[tuple[MemoryTerm, ...], ...]
    arena_gaps: float = 0.0

    def activation_bytes(self, batch: int, seq_len: int, rank: int, past: int = 0) -> int:
        """Bytes of the tensors alive at the worst moment of one run."""

        def value(term: MemoryTerm) -> float:
            sizes: int = batch**term.batch_power * seq_len**term.seq_power * rank**term.rank_power
            cached: int = past**term.past_power
            return term.bytes * sizes * cached

        return max((int(sum(map(value, terms))) for terms in self.peaks), default=0)

    def arena_bytes(self, batch: int, seq_len: int, rank: int, past: int = 0) -> int:
        """What the arena takes for the tensors alive at the worst moment of one run, with its gaps."""
        return int((1 + self.arena_gaps) * self.activation_bytes(batch, seq_len, rank, past))


#: Of graphs that have not been measured yet.
UNKNOWN_MEMORY = MemoryFormula(session_bytes=0, peaks=())
