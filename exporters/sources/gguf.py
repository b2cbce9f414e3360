"""A GGUF file as a transformers model: weights decoded to float32 by transformers' own reader, and beside it
those that the file has quantized, as they are.

Source: GGUF, version 3; `transformers.modeling_gguf_pytorch_utils`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from edgepeft.errors import EdgePeftError, ExportError, MissingExtraError
from edgepeft.files import temporary_folder

from .model_files import read_copied_files
from .quiet import quiet
from .tied_weights import canonical_names
from .tokenizer import TokenizerFiles, described

if TYPE_CHECKING:
    from .quantized.gguf_weights import GgufWeights


def is_gguf_file(model: object) -> bool:
    """Whether `model` is the path of a GGUF file."""
    return isinstance(model, str | Path) and Path(model).suffix == ".gguf"


def load_gguf(path: Path) -> tuple[Any, TokenizerFiles, GgufWeights]:
    """The language model of a GGUF file, float32, the tokenizer made of it, its chat template too, and the
    weights that the file has quantized.

    Raises:
        ExportError: there is no such file, it is damaged, or transformers cannot read it.
        MissingExtraError: the package `gguf` is not installed, or another that transformers reads it with.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ExportError(f"{path} is not a GGUF file: it does not begin with GGUF")
    place: dict[str, Any] = {"gguf_file": path.name}
    # transformers 5.23 keeps the file's blocks where it has kernels for them, unless told otherwise.
    whole = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    try:
        # Late: no other export needs the package.
        from .quantized.gguf_file import read_tensors
        from .quantized.gguf_weights import GgufWeights

        tensors = read_tensors(path)
        with quiet(), _parsed_once():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, **place, **whole
            )
            model, found = loaded
            _check_whole(path, model, found["missing_keys"])
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **place)
    except EdgePeftError:
        raise
    except ImportError as error:
        raise MissingExtraError(error.name or "gguf", "export", "reading a GGUF file") from error
    except Exception as error:  # the reader raises whatever its parser ran into
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(
            f"transformers cannot read {path} ({reason}): it is cut short or damaged, or of an architecture "
            "that transformers does not read from GGUF; compare its size with where it came from"
        ) from error
    with temporary_folder() as folder:
        tokenizer.save_pretrained(folder)
        text = described(path.name, tokenizer, read_copied_files(str(folder)), writes=True)
    return model, text, GgufWeights(path, tensors, model)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Have transformers parse a file once: it does so for the configuration, for the weights and for the
    tokenizer, each time with an array for every token of the vocabulary. The table of llama.cpp's names,
    which it asks for at every module, is made once, too."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Numpy's own arrays of the mapped file: a part of a `memmap` takes three times as long to make."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    package: Any = gguf
    found = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader, package.get_tensor_name_map = functools.cache(Reader), functools.cache(found[1])
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = found


def _check_whole(path: Path, model: Any, missing: Iterable[str]) -> None:
    """Refuse a file that lacks weights, for which transformers has drawn others.

    Raises:
        ExportError: names one.
    """
    canonical = canonical_names(model)
    lacking = sorted({canonical.get(name, name) for name in missing})
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ExportError(
            f"{path}: has no weights for {lacking[0]}{more}: it is one of several files (join them with "
            "llama.cpp's gguf-split --merge), or of another architecture than it says"
        )
