"""Products with block-quantized weights: linear, so central differences with a step of 1 are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..harness import Array, Case
from .arrays import integers, normal


def pack(codes: Array, bits: int, block_size: int) -> Array:
    """Codes `[N, K]` as the bytes `[N, ceil(K / block_size), block_size · bits / 8]` of MatMulNBits."""
    rows, columns = codes.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.uint8)
    padded[:, :columns] = codes
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    grouped = padded.reshape(rows, -1, per_byte).astype(np.uint8)
    packed = np.bitwise_or.reduce(grouped << shifts, axis=-1).astype(np.uint8)
    return packed.reshape(rows, blocks, block_size * bits // 8)


def _product(weight: Array) -> Callable[..., Any]:
    return lambda a, *_: a @ torch.tensor(weight).T


def cases() -> Iterator[Case]:
    for bits in (4, 8):
        for rows, columns, block_size in ((5, 32, 16), (3, 64, 32)):
            codes = integers(0, 1 << bits, rows, columns)
            scales = np.abs(normal(rows, columns // block_size, seed=1)).astype(np.float32)
            weight = (codes - (1 << (bits - 1))) * np.repeat(scales.astype(np.float64), block_size, axis=1)
            attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block_size}
            for batch in ((2,), (1, 3), (2, 0)):
                for flat in (False, True):
                    yield Case(
                        "com.microsoft::MatMulNBits",
                        (
                            normal(*batch, columns),
                            pack(codes, bits, block_size),
                            scales.ravel() if flat else scales,
                        ),
                        _product(weight),
                        attributes,
                        wrt=(0,),
                        constants=(1, 2),
                        float64=False,
                        symbolic_axes=tuple(range(len(batch))),
                    )
