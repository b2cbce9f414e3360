"""What a model made of a prompt, in a file: its keys and values, so that the prompt need not be read again.

One safetensors file: a tensor `[kv_heads, tokens, head_dim]` for each part of the cache, and in the metadata
the tokens and what the keys and values depend on. A file is not trusted: names, dtypes and shapes are checked
against the manifest before any of its tensors is read.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import AdapterError, UsageError
from edgepeft.runtime.cache import cache_specs
from edgepeft.runtime.decoding.base import Array
from edgepeft.tensor_files import TensorFile, write_tensors

_KEY = "edgepeft_prompt"


def origin(manifest: Manifest, adapter_inputs: Mapping[str, Array]) -> dict[str, str]:
    """What keys and values depend on beside the tokens, by names that people know: SHA-256 of the inference
    graph and the weights, and of the adapter as the graph gets it."""
    graph = manifest.files[manifest.graphs["inference"].file].sha256
    weights = manifest.files[manifest.weights_file].sha256
    digest = hashlib.sha256()
    for name in sorted(adapter_inputs):
        value = adapter_inputs[name]
        digest.update(f"{name} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).data)
    return {
        "bundle": hashlib.sha256(f"{graph} {weights}".encode()).hexdigest(),
        "adapter": digest.hexdigest(),
    }


def save_prompt_cache(
    path: Path, made_by: Mapping[str, str], ids: Sequence[int], state: Mapping[str, Array]
) -> None:
    """Write a decoder's snapshot.

    Args:
        path: the file, replaced if it exists.
        made_by: see `origin`.
        ids: the tokens that were read.
        state: `Decoder.snapshot` of them.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    write_tensors(path, state, {_KEY: json.dumps({**made_by, "ids": list(ids)})})


class PromptCache:
    """A prompt cache file, its header checked.

    Args:
        path: the file.
        manifest: of the bundle that will use it.

    Attributes:
        ids: the tokens that it holds.

    Raises:
        UsageError: the file is missing, damaged, or no prompt cache of a model like this one.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        try:
            self._file = TensorFile(path)
            self._made_by = json.loads(self._file.metadata.get(_KEY, "null"))
        except (AdapterError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: is no prompt cache ({error}): save it again") from error
        self.ids = self._checked_ids(manifest)
        expected = {
            name: (np.dtype(spec.dtype), (int(spec.shape[1]), len(self.ids), int(spec.shape[3])))
            for name, spec in cache_specs(manifest).items()
        }
        found = self._file.specs
        if found.keys() != expected.keys():
            name = sorted(found.keys() ^ expected.keys())[0]
            raise UsageError(
                f"{path}: is a prompt cache of another model, {name!r} is in one of them only: save it again"
            )
        for name, spec in expected.items():
            if found[name] != spec:
                raise UsageError(
                    f"{path}: tensor {name!r} is {_shown(found[name])}, the model has {_shown(spec)}: save "
                    "it again"
                )

    def check_origin(self, expected: Mapping[str, str]) -> None:
        """Refuse a file that another bundle or adapter made.

        Raises:
            UsageError: says which.
        """
        for name, value in expected.items():
            if self._made_by.get(name) != value:
                raise UsageError(
                    f"{self._path}: was saved with another {name}: give the one that it was saved with, or "
                    "save it again"
                )

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt the file stands for; the last one is always read, for its logits."""
        pairs = zip(self.ids, ids[:-1], strict=False)
        return next(
            (index for index, (one, other) in enumerate(pairs) if one != other),
            min(len(self.ids), len(ids) - 1),
        )

    def state(self, length: int) -> Mapping[str, Array]:
        """What `Decoder.restore` takes for the first `length` tokens; each tensor is read when it is asked
        for, so that two are never in memory."""
        return _FirstTokens(self._file, length)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def _checked_ids(self, manifest: Manifest) -> list[int]:
        ids = self._made_by.get("ids") if isinstance(self._made_by, dict) else None
        vocabulary = manifest.model.vocab_size
        if (
            not isinstance(ids, list)
            or not 0 < len(ids) <= manifest.model.max_length
            or not all(type(token) is int and 0 <= token < vocabulary for token in ids)
        ):
            raise UsageError(f"{self._path}: is no prompt cache of this model: save it again")
        return ids


class _FirstTokens(Mapping[str, Array]):
    def __init__(self, file: TensorFile, length: int) -> None:
        self._file, self._length = file, length

    def __getitem__(self, name: str) -> Array:
        return self._file.part(name, (slice(None), slice(self._length)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.specs)

    def __len__(self) -> int:
        return len(self._file.specs)


def _shown(spec: tuple[Any, tuple[int, ...]]) -> str:
    return f"{spec[0]} {list(spec[1])}"
