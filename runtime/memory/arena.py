"""One arena for all sessions of a chain, which run one after the other and want the same memory."""

import functools

import onnxruntime as ort

_KIB, _MIB = 2**10, 2**20


@functools.cache
def register_shared_arena() -> None:
    """Give this process's onnxruntime an arena that sessions with `session.use_env_allocators` share.

    It asks the system for regions, each twice as large as the last: what no tensor has been in yet takes no
    memory, and within a region a free place beside another is one place. So a batch finds an empty arena,
    whatever ran before it, and a process takes what its largest batch takes. An arena that asks for every
    tensor apart keeps a place of each size that it ever had: `docs/decisions.md` has the figures.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(
        memory,
        ort.OrtArenaCfg(
            {
                "max_mem": 0,
                "arena_extend_strategy": 0,  # by powers of two
                # The first region is never given back. The second follows it, and again after the arena was
                # shrunk; onnxruntime's record of a region takes 1/32 of it at once.
                "initial_chunk_size_bytes": _MIB,
                "initial_growth_chunk_size_bytes": 2 * _MIB,
                # A tensor that leaves more of a place than this leaves it to others.
                "max_dead_bytes_per_chunk": 64 * _KIB,
            }
        ),
    )
