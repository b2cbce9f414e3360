"""One arena for the sessions of an update, which run one after the other and want the same memory."""

import functools

import onnxruntime as ort

_KIB, _MIB = 2**10, 2**20
_MOST_BYTES = 2**31 - 1  # onnxruntime's setting is an int


@functools.cache
def register_shared_arena() -> None:
    """Give this process's onnxruntime an arena that sessions with `session.use_env_allocators` share, unless
    it has one.

    It asks the system for regions, each twice as large as the last: what no tensor has been in yet takes no
    memory, and within a region a free place beside another is one place. An arena that asks for every tensor
    apart keeps a place of each size that it ever had: `docs/decisions/memory.md` has the figures.
    """
    _register(_MIB)


def renew_shared_arena(nbytes: int = _MIB) -> None:
    """Have sessions that are opened from now on share a new arena; the last one is freed with the sessions
    that are still open on it.

    Args:
        nbytes: what they are expected to take, which is the size of its first region. Where that is enough,
            a batch finds it empty and whole, whatever ran before it, and the process takes what its largest
            batch takes. Tensors of mixed lengths in several regions are each time other ones in other places.
            onnxruntime's record of a region takes 1/32 of it at once.
    """
    register_shared_arena()
    _register(min(max(nbytes, _MIB), _MOST_BYTES))


def _register(region_bytes: int) -> None:
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(
        memory,
        ort.OrtArenaCfg(
            {
                "max_mem": 0,
                "arena_extend_strategy": 0,  # by powers of two
                "initial_chunk_size_bytes": region_bytes,
                # A tensor that leaves more of a place than this leaves it to others.
                "max_dead_bytes_per_chunk": 64 * _KIB,
            }
        ),
    )
