"""llama.cpp as it runs a GGUF file, through the C functions of its shared library (`llama.h` of 2026).

The library is any build's `libllama.so`. Beside that of `npm pack @node-llama-cpp/linux-x64` (bins/linux-x64)
lie kernels for each kind of processor, and ggml takes the best. Its own defaults but for the threads: flash
attention where it has it, a cache of float16.
"""

import ctypes
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.llama_cpp_files import LlamaCppError, _Log

#: Parameters are passed by value: more than they take, of which the library sets and reads what it has.
_Parameters = ctypes.c_byte * 1024


class _Struct(ctypes.Structure):
    """`llama_model_params` or `llama_context_params`, whose members are left as the library sets them."""

    _fields_ = [("members", _Parameters)]


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [("n_tokens", ctypes.c_int32), *((f"array{number}", ctypes.c_void_p) for number in range(6))]


class LlamaCpp:
    """A model of a GGUF file that reads and writes tokens, with a context of 512.

    Args:
        library: path of `libllama.so`; libraries that it needs lie beside it.
        file: the GGUF file.
        threads: for all it does.

    Raises:
        LlamaCppError: the library is another, or cannot read the file.
    """

    def __init__(self, library: Path, file: Path, threads: int) -> None:
        try:
            ggml = ctypes.CDLL(str(next(library.parent.glob("libggml.*so*"))), ctypes.RTLD_GLOBAL)
            self._library = ctypes.CDLL(str(library))
            self._declare()
        except (OSError, AttributeError, StopIteration) as error:
            raise LlamaCppError(f"{library}: {error}: it is not llama.cpp's library") from error
        self._silent = _Log(lambda *_: None)
        self._library.llama_log_set(self._silent, None)
        ggml.ggml_backend_load_all_from_path(bytes(library.parent))
        parameters = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(bytes(file), parameters)
        if not self._model:
            raise LlamaCppError(f"{file}: llama.cpp cannot read it")
        context = self._library.llama_context_default_params()
        self._context = self._library.llama_init_from_model(self._model, context)
        if not self._context:
            raise LlamaCppError(f"{file}: llama.cpp makes no context")
        self._library.llama_set_n_threads(self._context, threads, threads)
        vocabulary = self._library.llama_model_get_vocab(self._model)
        self._words = int(self._library.llama_vocab_n_tokens(vocabulary))

    def forget(self) -> None:
        """Begin a new text."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def read(self, tokens: Iterable[int]) -> np.ndarray:
        """Go on with these tokens: the last one's logits, float32 `[vocabulary]`, until the next call."""
        ids = np.fromiter(tokens, np.int32)
        batch = self._library.llama_batch_get_one(ids.ctypes.data, len(ids))
        if self._library.llama_decode(self._context, batch):
            raise LlamaCppError(f"llama.cpp could not read {len(ids)} tokens")
        found = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._words,))

    def _declare(self) -> None:
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        for name, returns, takes in (
            ("llama_model_default_params", _Struct, []),
            ("llama_context_default_params", _Struct, []),
            ("llama_model_load_from_file", pointer, [text, _Struct]),
            ("llama_init_from_model", pointer, [pointer, _Struct]),
            ("llama_set_n_threads", None, [pointer, ctypes.c_int32, ctypes.c_int32]),
            ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
            ("llama_get_memory", pointer, [pointer]),
            ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
            ("llama_batch_get_one", _Batch, [pointer, ctypes.c_int32]),
            ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = returns, takes
