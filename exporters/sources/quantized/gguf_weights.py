"""The quantized weights of a GGUF file by the names that they have in the model that transformers made of it.

transformers renames tensors, puts rows in another order (the query's and the key's of Llama) and transposes
weights, in other ways in other versions. So a tensor is not looked for by its name: the weight that it became
has the same values in every row, to the last bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from ...quantize.layouts import QuantizedWeight
from ..tied_weights import canonical_names
from ..tracing import conv1d_weights
from .gguf_file import GgufTensor
from .gguf_layouts import has_layout, quantized_weight

#: Weights that are compared at a time: few enough not to go through a scratch file.
_CHUNK_VALUES = 2**17


@dataclass(frozen=True)
class _Found:
    """A tensor that is a weight; `order` says for each row of the weight which of the tensor's it is, int64
    `[rows]` (None: the same)."""

    tensor: GgufTensor
    order: np.ndarray | None


class GgufWeights(Mapping[str, QuantizedWeight]):
    """By state-dict key, the weights whose codes and scales a GGUF file holds; each is read when it is asked
    for.

    A weight that is tied goes by the name that the trace gives it (`tied_weights.canonical_names`), and a
    `Conv1D`'s is `[out, in]`, as there.

    Attributes:
        left_out: the file's names of its other quantized tensors: of three dimensions (experts), of a type
            that has no layout, or of values that no weight has.
    """

    def __init__(self, path: Path, tensors: Sequence[GgufTensor], model: Any) -> None:
        """Find the weights.

        Args:
            path: the file; it is mapped as long as this is there.
            tensors: what it has (`gguf_file.read_tensors`).
            model: what transformers made of it, with float32 parameters.
        """
        self._bytes = np.memmap(path, np.uint8, "r")
        self._found: dict[str, _Found] = {}
        left_out = []
        weights = _matrices(model)
        for tensor in tensors:
            if not tensor.is_quantized:
                continue
            name = self._find(tensor, weights)
            if name is None:
                left_out.append(tensor.name)
            else:
                del weights[name]
        self.left_out = tuple(left_out)

    def __getitem__(self, name: str) -> QuantizedWeight:
        found = self._found[name]
        return quantized_weight(self._stored(found.tensor), found.tensor.kind, found.order)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def _stored(self, tensor: GgufTensor) -> np.ndarray:
        """A tensor as the file has it, uint8 `[rows, bytes of a row]`."""
        return self._bytes[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape[0], -1)

    def _find(self, tensor: GgufTensor, weights: Mapping[str, np.ndarray]) -> str | None:
        """Note which of `weights` a tensor is, and return its name; None where it is none of them."""
        if not has_layout(tensor.kind) or len(tensor.shape) != 2:
            return None
        stored = self._stored(tensor)
        # Rows at the ends are of tokens that no text has, and many tables have those in common.
        middle = len(stored) // 2
        probe = _decoded(stored[middle : middle + 1], tensor.kind)[0]
        for name, weight in weights.items():
            if weight.shape != tensor.shape or not _has_row(weight, probe):
                continue
            same = _is_equal(stored, tensor.kind, weight)
            order = None if same else _row_order(stored, tensor.kind, weight)
            if same or order is not None:
                self._found[name] = _Found(tensor, order)
                return name
        return None


def _matrices(model: Any) -> dict[str, np.ndarray]:
    """A model's parameters of two dimensions by their canonical names, as its trace has them."""
    turned = conv1d_weights(model)
    canonical = canonical_names(model)
    return {
        name: parameter.detach().T.numpy() if name in turned else parameter.detach().numpy()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim == 2 and canonical[name] == name
    }


def _has_row(weight: np.ndarray, row: np.ndarray) -> bool:
    return any(np.array_equal(weight[place], row) for place in np.flatnonzero(weight[:, 0] == row[0]))


def _is_equal(stored: np.ndarray, kind: GGMLQuantizationType, weight: np.ndarray) -> bool:
    chunks = _chunks(stored, kind, weight.shape[1])
    return all(np.array_equal(chunk, weight[first : first + len(chunk)]) for first, chunk in chunks)


def _row_order(stored: np.ndarray, kind: GGMLQuantizationType, weight: np.ndarray) -> np.ndarray | None:
    """int64 `[rows]`, for every row of `weight` the equal one of `stored`; None where there is none."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(weight):
        places.setdefault(hash(row.tobytes()), []).append(place)
    order = np.full(len(weight), -1, np.int64)
    for first, chunk in _chunks(stored, kind, weight.shape[1]):
        for number, row in enumerate(chunk, first):
            for place in places.pop(hash(row.tobytes()), ()):
                if np.array_equal(row, weight[place]):
                    order[place] = number
    return None if (order < 0).any() else order


def _chunks(stored: np.ndarray, kind: GGMLQuantizationType, columns: int) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor's values, some rows at a time, with the number of the first."""
    step = max(1, _CHUNK_VALUES // columns)
    for first in range(0, len(stored), step):
        yield first, _decoded(stored[first : first + step], kind)


def _decoded(stored: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    return quantized_weight(stored, kind).dequantize().numpy()
