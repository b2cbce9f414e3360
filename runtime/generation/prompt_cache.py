"""What a model made of a prompt: its keys and values, so that the prompt need not be read again.

A file of it is safetensors: a tensor `[kv_heads, tokens, head_dim]` for each part of the cache, and in the
metadata the tokens and what the keys and values depend on. It is not trusted: names, dtypes and shapes are
checked against the manifest before any of its tensors is read.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import AdapterError, UsageError
from edgepeft.tensor_files import TensorFile, check_sums, write_tensors

from ..adapters.virtual_tokens import ids_end
from ..key_value_cache import cache_specs
from ..memory.room import check_room
from .decoders.base import Array

_KEY = "edgepeft_prompt"


def origin(manifest: Manifest, role: str, adapter_inputs: Mapping[str, Array]) -> dict[str, str]:
    """What keys and values depend on beside the tokens, by names that people know: SHA-256 of the inference
    graph and the weights, and of the adapter as the graph gets it; and whether activations were rounded by
    the graph of this role."""
    graph = manifest.files[manifest.graphs["inference"].file].sha256
    weights = manifest.files[manifest.weights_file].sha256
    rounds = manifest.decoder is not None and role in manifest.decoder.pairs[1]
    digest = hashlib.sha256()
    for name in sorted(adapter_inputs):
        value = adapter_inputs[name]
        digest.update(f"{name} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).data)
    return {
        "bundle": hashlib.sha256(f"{graph} {weights}".encode()).hexdigest(),
        "adapter": digest.hexdigest(),
        "precision": "int8 activations" if rounds else "exact",
    }


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of tokens that a model has read, in memory or in a file.

    Attributes:
        ids: the tokens.
        made_by: see `origin`.
        names: of the tensors, `[kv_heads, tokens, head_dim]` each.
        first: a tensor's first so many tokens, by its name.
        held_bytes: bytes of the tensors that are in memory.
        where: for messages.
    """

    ids: list[int]
    made_by: Mapping[str, str]
    names: tuple[str, ...]
    first: Callable[[str, int], Array]
    held_bytes: int = 0
    where: str = "the prompt cache"

    @classmethod
    def of(cls, ids: Sequence[int], made_by: Mapping[str, str], state: Mapping[str, Array]) -> "PromptCache":
        """In memory, of a decoder's snapshot."""
        held_bytes = sum(value.nbytes for value in state.values())
        return cls(list(ids), made_by, tuple(state), lambda name, count: state[name][:, :count], held_bytes)

    def check_origin(self, expected: Mapping[str, str]) -> None:
        """Refuse what another bundle or adapter made.

        Raises:
            UsageError: says which.
        """
        for name, value in expected.items():
            if self.made_by.get(name) != value:
                raise UsageError(
                    f"{self.where}: was made with another {name}: give the one that it was made "
                    "with, or make it again"
                )

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt the cache stands for; the last one is always read, for its logits."""
        pairs = zip(self.ids, ids[:-1], strict=False)
        return next(
            (index for index, (one, other) in enumerate(pairs) if one != other),
            min(len(self.ids), len(ids) - 1),
        )

    def state(self, length: int) -> Mapping[str, Array]:
        """What `Decoder.restore` takes for the first `length` tokens; a file's tensors are read when they are
        asked for, so that two are never in memory."""
        return _FirstTokens(self, length)

    def save(self, path: str | Path) -> None:
        """Write a file for `prompt_cache`; it holds for the same bundle and adapter.

        Raises:
            EdgePeftError: the file cannot be written.
        """
        metadata = {_KEY: json.dumps({**self.made_by, "ids": self.ids})}
        write_tensors(Path(path), dict(self.state(len(self.ids))), metadata, checksums=True)


class _FirstTokens(Mapping[str, Array]):
    def __init__(self, cache: PromptCache, length: int) -> None:
        self._cache, self._length = cache, length

    def __getitem__(self, name: str) -> Array:
        return self._cache.first(name, self._length)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache.names)

    def __len__(self) -> int:
        return len(self._cache.names)


def open_prompt_cache(path: Path, manifest: Manifest) -> PromptCache:
    """A prompt cache file, its header and checksums checked; its tensors stay in the file.

    Args:
        path: the file.
        manifest: of the bundle that will use it.

    Raises:
        UsageError: the file is missing, damaged, or no prompt cache of a model like this one.
        BudgetError: the memory budget has no room for it.
    """
    try:
        file = TensorFile(path)
        made_by = json.loads(file.metadata.get(_KEY, "null"))
    except (AdapterError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no prompt cache ({error}): make it again") from error
    check_room(path.stat().st_size, f"{path}: the prompt cache")
    ids = _checked_ids(path, made_by, manifest)
    expected = {
        name: (np.dtype(spec.dtype), (int(spec.shape[1]), len(ids), int(spec.shape[3])))
        for name, spec in cache_specs(manifest).items()
    }
    if file.specs.keys() != expected.keys():
        name = sorted(file.specs.keys() ^ expected.keys())[0]
        raise UsageError(
            f"{path}: is a prompt cache of another model, {name!r} is in one of them only: make it again"
        )
    for name, spec in expected.items():
        if file.specs[name] != spec:
            raise UsageError(
                f"{path}: tensor {name!r} is {_shown(file.specs[name])}, the model has {_shown(spec)}: make "
                "it again"
            )
    try:
        check_sums(path)
    except AdapterError as error:
        raise UsageError(f"{error}: make it again") from error

    def first(name: str, count: int) -> Array:
        return file.part(name, (slice(None), slice(count)))

    return PromptCache(ids, made_by, tuple(expected), first, where=str(path))


def _checked_ids(path: Path, made_by: object, manifest: Manifest) -> list[int]:
    ids = made_by.get("ids") if isinstance(made_by, dict) else None
    limit = ids_end(manifest)
    if (
        not isinstance(ids, list)
        or not 0 < len(ids) <= manifest.model.max_length
        or not all(type(token) is int and 0 <= token < limit for token in ids)
    ):
        raise UsageError(f"{path}: is no prompt cache of this model: make it again")
    return ids


def _shown(spec: tuple[Any, tuple[int, ...]]) -> str:
    return f"{spec[0]} {list(spec[1])}"
