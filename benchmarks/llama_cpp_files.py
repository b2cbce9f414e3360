"""llama.cpp's files of a model: a float16 one, and what its own quantizer makes of that.

The quantizer is asked through llama.cpp's shared library (`libllama.so`, `llama_model_quantize`), of any
build whose `llama_model_quantize_params` takes an importance matrix as an array, which those of 2026 do. One
that is compiled already is in `npm pack @node-llama-cpp/linux-x64`; llama-cpp-python compiles one.
"""

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]

#: `llama_ftype` of each kind of file.
KINDS = {"Q4_0": 2, "IQ4_NL": 25, "Q4_K_S": 14, "Q4_K_M": 15, "Q8_0": 7}
_FLOAT16 = 1
#: Architectures of which llama.cpp orders the rows of queries and keys in pairs, for its rotary embedding.
_PAIRED = ("llama",)
#: … and of which it adds the 1 of `1 + w` to the norms' weights.
_ADDED = ("gemma", "gemma2", "gemma3")


class LlamaCppError(RuntimeError):
    """llama.cpp's library is not what is expected of it, or refuses."""


class _Importance(ctypes.Structure):
    """`llama_model_imatrix_data`; one without a name ends an array of them."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    ]


#: `ggml_log_callback`.
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Quantizer:
    """llama.cpp's quantizer.

    Args:
        library: path of `libllama.so`; libraries that it needs lie beside it.

    Raises:
        LlamaCppError: it cannot be loaded, or its parameters are laid out otherwise.
    """

    def __init__(self, library: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
            self._library.llama_model_quantize_default_params.restype = _Parameters
            self._library.llama_model_quantize.argtypes = [
                ctypes.c_char_p,
                ctypes.c_char_p,
                ctypes.POINTER(_Parameters),
            ]
            self._library.llama_model_quantize.restype = ctypes.c_uint32
            self._silent = _Log(lambda *_: None)  # it says a line a tensor
            self._library.llama_log_set(self._silent, None)
        except (OSError, AttributeError) as error:
            raise LlamaCppError(f"{library}: {error}: it is not llama.cpp's library") from error
        default = self._defaults()
        switches = [getattr(default, field[0]) for field in _Parameters._fields_ if field[1] is ctypes.c_bool]
        if switches != [False, True, *[False] * 4] or default.imatrix or default.kv_overrides:
            raise LlamaCppError(
                f"{library}: llama_model_quantize_params has other members: take a build of 2026"
            )

    def __call__(
        self, source: Path, output: Path, kind: str, importance: Mapping[str, FloatArray] | None = None
    ) -> None:
        """Write a quantized file.

        Args:
            source: a float16 GGUF file.
            output: the file to write.
            kind: one of `KINDS`.
            importance: of tensors by their names in the file, mean squares of each input `[columns]`.

        Raises:
            LlamaCppError: it could not.
        """
        parameters = self._defaults()
        parameters.ftype, parameters.nthread = KINDS[kind], 1
        entries = [
            _Importance(name.encode(), values.ctypes.data, values.size)
            for name, values in (importance or {}).items()
        ]
        if entries:
            parameters.imatrix = (_Importance * (len(entries) + 1))(*entries)
        if self._library.llama_model_quantize(bytes(source), bytes(output), ctypes.byref(parameters)):
            raise LlamaCppError(f"{source}: llama.cpp could not write {kind}")

    def _defaults(self) -> _Parameters:
        parameters: _Parameters = self._library.llama_model_quantize_default_params()
        return parameters


class Names:
    """What a GGUF file calls the tensors of a transformers model.

    Args:
        kind: the file's architecture, such as `llama`.
        layers: how many the model has.
    """

    def __init__(self, kind: str, layers: int) -> None:
        known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(known[kind], layers)

    def __getitem__(self, parameter: str) -> str:
        name = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LlamaCppError(f"llama.cpp has no name for {parameter}")
        return str(name)


def write_float16(model: Any, like: Path, output: Path) -> None:
    """Write a model as a GGUF file: matrices float16, vectors float32.

    Args:
        model: a transformers model, whose output layer is tied.
        like: a file of the same model with other weights, whose fields and tokenizer are taken.
        output: the file.
    """
    reader, kind = gguf.GGUFReader(like), architecture(like)
    names = Names(kind, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(output, kind)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = _FLOAT16 if field.name == "general.file_type" else field.contents()
        element = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=element)
    for name, tensor in model.named_parameters():
        written = _as_written(name, tensor.detach(), kind, model.config)
        writer.add_tensor(names[name], written.numpy() if tensor.ndim == 1 else written.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_written(name: str, tensor: torch.Tensor, kind: str, config: Any) -> torch.Tensor:
    """A tensor as llama.cpp's own converter writes it."""
    if kind in _ADDED and name.endswith("norm.weight"):
        return tensor + 1
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None or kind not in _PAIRED:
        return tensor.contiguous()
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def architecture(path: Path) -> str:
    """A GGUF file's architecture, such as `llama`."""
    return str(gguf.GGUFReader(path).fields["general.architecture"].contents())


def tensor_bytes(path: Path) -> int:
    """Bytes of a GGUF file's tensors."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def tensor_kinds(path: Path) -> dict[str, int]:
    """How many of a GGUF file's weights are of which type."""
    kinds: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return kinds


@torch.no_grad()
def importance_matrix(model: Any, kind: str, windows: Iterable[list[int]]) -> dict[str, FloatArray]:
    """What `llama-imatrix` finds: mean squares of the inputs of every linear, the output layer left out.

    Args:
        model: a transformers model.
        kind: the GGUF file's architecture.
        windows: token ids of each pass.

    Returns:
        By the file's names, float32 `[columns]`.
    """
    names = Names(kind, model.config.num_hidden_layers)
    sums: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(_adding(sums, names[f"{name}.weight"]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    tokens = 0
    for ids in windows:
        model.model(input_ids=torch.tensor([ids]))
        tokens += len(ids)
    for hook in hooks:
        hook.remove()
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def _adding(sums: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_module: Any, inputs: tuple[torch.Tensor]) -> None:
        squares = inputs[0].detach().double().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    return hook
