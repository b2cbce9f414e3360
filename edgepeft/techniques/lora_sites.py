"""A LoRA on what is no linear module: an embedding, a convolution. The adapter, its rank and its scaling are
those of `lora`.

Of an embedding `y = W[ids]` it is `y += ((A[ids]) * scaling) B`, with `A` `[num_embeddings, rank]` and `B`
`[rank, embedding_dim]`: PEFT's `lora_embedding_A` and `lora_embedding_B` transposed. A layer that is tied to
the table stays as it is, as in PEFT.

Of a convolution it is `y += conv1x1(conv(x, A) * scaling, B)`, with `A` `[rank, in_channels, *kernel]`, which
moves over x as the module's own weight does, and `B` `[out_channels, rank, 1, …]`, as in PEFT's file.

Source: arXiv 2106.09685; `peft.tuners.lora.layer.Embedding` and `_ConvNd`.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import AdapterError
from ..slots import CONVOLUTION, EMBEDDING, EMPTY, LINEAR, LORA, PREFIX, SIZE, Slot, SlotTensor
from .base import FloatArray, Held, Tensors, difference

A, B, SCALING = "A", "B", "scaling"
"""What a slot's tensors are called."""
SITE = "site"
"""What a module's settings say that is no linear, before it has a slot."""
SUFFIXES = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B")


def site_of(tensors: Tensors, module: str) -> str:
    """What an adapter's module is, by its tensors."""
    if f"{PREFIX}{module}{EMBEDDING_SUFFIXES[0]}" in tensors:
        return EMBEDDING
    tensor = tensors.get(f"{PREFIX}{module}{SUFFIXES[0]}")
    return LINEAR if tensor is None or tensor.ndim == 2 else CONVOLUTION


def embedding_slot(module: str, num_embeddings: int, embedding_dim: int, activation_axes: int) -> Slot:
    """A slot on an embedding; see `Slot` for its axes."""
    return _slot(EMBEDDING, module, (num_embeddings, SIZE), (SIZE, embedding_dim), activation_axes)


def convolution_slot(
    module: str, in_channels: int, out_channels: int, kernel: Sequence[int], activation_axes: int
) -> Slot:
    """A slot on a convolution; see `Slot` for its axes."""
    a: tuple[int | str, ...] = (SIZE, in_channels, *kernel)
    b: tuple[int | str, ...] = (out_channels, SIZE, *(1 for _ in kernel))
    return _slot(CONVOLUTION, module, a, b, activation_axes)


def _slot(
    site: str, module: str, a: tuple[int | str, ...], b: tuple[int | str, ...], activation_axes: int
) -> Slot:
    suffixes = EMBEDDING_SUFFIXES if site == EMBEDDING else SUFFIXES
    key, turned = f"{PREFIX}{module}", site == EMBEDDING
    factors = (
        SlotTensor(name, key + suffix, key + suffix, shape, transposed=turned, trains=True, neutral=EMPTY)
        for name, suffix, shape in zip((A, B), suffixes, (a, b), strict=True)
    )
    scaling = SlotTensor(
        SCALING, f"{key}.scaling", None, (SIZE,), transposed=False, trains=False, neutral=EMPTY
    )
    return Slot(LORA, site, module, (*factors, scaling), activation_axes=activation_axes)


def problem(slot: Slot) -> str | None:
    """What of a manifest's slot is not as it is made here; None if all is."""
    by_name = {tensor.name: tensor.shape for tensor in slot.tensors}
    a, b = by_name.get(A, ()), by_name.get(B, ())
    axes = 2 if slot.site == EMBEDDING else len(a)
    sizes = [size for size in (*a, *b) if type(size) is int and size > 0]
    if (
        (len(a), len(b)) != (axes, axes)
        or axes < (2 if slot.site == EMBEDDING else 3)
        or len(sizes) != 2 * (axes - 1)
    ):
        return f"has tensors of shapes {[list(shape) for shape in by_name.values()]}, which are no LoRA's"
    if slot.site == EMBEDDING:
        return difference(slot, embedding_slot(slot.module, sizes[0], sizes[1], slot.activation_axes))
    kernel = sizes[1 : axes - 1]
    return difference(
        slot, convolution_slot(slot.module, sizes[0], sizes[axes - 1], kernel, slot.activation_axes)
    )


def fresh(slot: Slot, size: int, rng: np.random.Generator) -> dict[str, FloatArray]:
    """As PEFT: on an embedding A zero and B normal; on a convolution A as `kaiming_uniform_(a=sqrt(5))` draws
    it, B zero."""
    a, b = (slot.tensor(name).sized(size) for name in (A, B))
    if slot.site == EMBEDDING:
        drawn = {A: np.zeros(a[::-1], np.float32), B: rng.standard_normal(b[::-1]).astype(np.float32)}
    else:
        bound = 1 / math.sqrt(math.prod(a[1:]))
        drawn = {A: rng.uniform(-bound, bound, a).astype(np.float32), B: np.zeros(b, np.float32)}
    return {slot.input(name): value for name, value in drawn.items()}


def check_pair(module: str, a: FloatArray, b: FloatArray, site: str, origin: str) -> None:
    """
    Raises:
        AdapterError: the tensors on an embedding or a convolution, in PEFT's layout, do not go together.
    """
    shapes = f"lora_A is {list(a.shape)}, lora_B {list(b.shape)}"
    if site == EMBEDDING:
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{origin}: module {module}: {shapes}, expected [rank, num_embeddings] and [embedding_dim, "
                "rank]"
            )
        return
    if a.ndim < 3 or a.ndim != b.ndim or set(b.shape[2:]) != {1}:
        raise AdapterError(
            f"{origin}: module {module}: {shapes}, expected [rank, in_channels, *kernel] and [out_channels, "
            "rank, 1, …] of a convolution"
        )
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{origin}: module {module}: {shapes}: a LoRA on a convolution in groups is not supported: train "
            "the adapter without it"
        )


def fit(slot: Slot, adapter: Held) -> None:
    """Check that what the adapter has on the slot's module is of the slot's site and sizes.

    Raises:
        AdapterError: names both.
    """
    site = site_of(adapter.tensors, slot.module)
    if site != slot.site:
        raise AdapterError(
            f"{adapter.origin}: module {slot.module} is a {slot.site} in this bundle, the adapter's tensors "
            f"are of a {site}: the adapter was made for another base"
        )
    for tensor in slot.tensors:
        if tensor.key is None:
            continue
        got = adapter.tensors[tensor.key].shape[:: -1 if tensor.transposed else 1]
        expected = tuple(own if size == SIZE else size for size, own in zip(tensor.shape, got, strict=False))
        if expected != got or len(got) != len(tensor.shape):
            raise AdapterError(
                f"{adapter.origin}: module {slot.module}: {tensor.name} is {list(got)} in the adapter, "
                f"{list(tensor.shape)} in this bundle: the adapter was made for another base"
            )
