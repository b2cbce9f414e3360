"""One arena for all sessions of a chain, which run one after the other and want the same memory."""

import functools

import onnxruntime as ort

# Ask the system for what a tensor needs, not for twice what was asked for last.
_AS_REQUESTED = 1
_MIB = 2**20


@functools.cache
def register_shared_arena() -> None:
    """Give this process's onnxruntime an arena that sessions with `session.use_env_allocators` share.

    Measured on SmolLM2-135M's shape at 128 tokens, anonymous memory at the peak: an arena for each session
    146 MiB, none 110 to 131, this one 98; the time is the same.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(
        memory,
        ort.OrtArenaCfg(
            {
                "max_mem": 0,
                "arena_extend_strategy": _AS_REQUESTED,
                "initial_chunk_size_bytes": _MIB,
                "max_dead_bytes_per_chunk": _MIB,
            }
        ),
    )
