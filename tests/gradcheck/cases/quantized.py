"""Products with block-quantized weights: linear, so central differences with a step of 1 are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from edgepeft.exporters.quantize.table_weight import TABLES

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


def _pack_zero_points(points: Array, bits: int) -> Array:
    """Zero points `[N, blocks]` as bytes, each row starting at a byte."""
    per_byte = 8 // bits
    rows, blocks = points.shape
    padded = np.zeros((rows, -(-blocks // per_byte) * per_byte), np.uint8)
    padded[:, :blocks] = points
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    grouped = padded.reshape(rows, -1, per_byte)
    return np.bitwise_or.reduce(grouped << shifts, axis=-1).astype(np.uint8)


def cases() -> Iterator[Case]:
    for bits in (2, 4, 8):
        for rows, columns, block_size in ((5, 32, 16), (3, 64, 32), (4, 40, 16), (3, 128, 128)):
            blocks = -(-columns // block_size)
            codes = integers(0, 1 << bits, rows, columns)
            scales = np.abs(normal(rows, blocks, seed=1)).astype(np.float32)
            points = integers(0, 1 << bits, rows, blocks, seed=2).astype(np.uint8)
            attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block_size}
            for zero_points in (None, points):
                middle = np.full_like(points, 1 << (bits - 1)) if zero_points is None else zero_points
                spread = [
                    np.repeat(x.astype(np.float64), block_size, axis=1)[:, :columns] for x in (middle, scales)
                ]
                weight = (codes - spread[0]) * spread[1]
                inputs: list[Array | None] = [pack(codes, bits, block_size), scales]
                if zero_points is not None:
                    inputs.append(_pack_zero_points(zero_points, bits))
                for batch in ((2,), (1, 3), (2, 0)):
                    yield Case(
                        "com.microsoft::MatMulNBits",
                        (normal(*batch, columns), *inputs),
                        _product(weight),
                        attributes,
                        wrt=(0,),
                        constants=(1, 2, 3),
                        float64=False,
                        symbolic_axes=tuple(range(len(batch))),
                        tolerance=1e-4,
                    )
    codes, scales = integers(0, 16, 4, 32), np.abs(normal(4, 2, seed=1)).astype(np.float32)
    weight = (codes - 8) * np.repeat(scales.astype(np.float64), 16, axis=1)
    yield Case(
        "com.microsoft::MatMulNBits",
        (normal(2, 3, 32), pack(codes, 4, 16), scales.ravel(), None, None, normal(4, seed=2)),
        lambda a, *rest: a @ torch.tensor(weight).T + rest[-1],
        {"K": 32, "N": 4, "bits": 4, "block_size": 16},
        wrt=(0, 5),
        constants=(1, 2),
        float64=False,
        symbolic_axes=(0, 1),
        static_inputs=(5,),
        tolerance=1e-4,
        label="bias",
    )
    points = integers(0, 16, 4, 2, seed=3).astype(np.uint8)
    shifted = (codes - np.repeat(points.astype(np.float64), 16, axis=1)) * np.repeat(
        scales.astype(np.float64), 16, axis=1
    )
    packed_points = _pack_zero_points(points, 4)
    yield Case(
        "com.microsoft::MatMulNBits",
        (normal(2, 3, 32), pack(codes, 4, 16), scales, packed_points, None, normal(4, seed=2)),
        lambda a, *rest: a @ torch.tensor(shifted).T + rest[-1],
        {"K": 32, "N": 4, "bits": 4, "block_size": 16},
        wrt=(0, 5),
        constants=(1, 2, 3),
        float64=False,
        symbolic_axes=(0, 1),
        static_inputs=(5,),
        tolerance=1e-4,
        label="zero points and bias",
    )
    yield from _bnb4()


def _bnb4() -> Iterator[Case]:
    for quant_type, table in TABLES.items():
        for rows, columns, block_size in ((4, 32, 16), (3, 32, 64), (3, 16, 32)):
            codes = integers(0, 16, rows, columns)
            line = codes.ravel()
            packed = ((line[0::2] << 4) | line[1::2]).astype(np.uint8)
            blocks = -(-line.size // block_size)
            largest = np.abs(normal(blocks, seed=1)).astype(np.float32)
            values = np.array(table, np.float64)[line] * np.repeat(largest, block_size)[: line.size]
            yield Case(
                "com.microsoft::MatMulBnb4",
                (normal(2, columns), packed, largest),
                _product(values.reshape(rows, columns)),
                {"K": columns, "N": rows, "block_size": block_size, "quant_type": quant_type},
                wrt=(0,),
                constants=(1, 2),
                float64=False,
                symbolic_axes=(0,),
                tolerance=1e-4,
            )
