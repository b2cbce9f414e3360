"""GGML's blocks as `QuantizedWeight`: the same codes and scales, in another order.

    Q4_0, Q5_0, Q8_0, IQ4_NL   w = q · d                  32 columns a block
    Q4_1, Q5_1                 w = q · d + m              32
    IQ4_XS                     w = q · (s · d)            32
    Q3_K, Q6_K                 w = q · (s · d)            16
    Q4_K, Q5_K                 w = q · (s · d) - t · e    32
    Q2_K                       w = q · (s · d) - t · e    16

d, m and e are float16. With s, which is int8 (beside t uint8, as t), d and e are each for 256 columns.
Codes of 2 and 3 bits become 4-bit codes, those of 5 and 6 bits and what IQ4's tables hold 8-bit codes.
Source: `ggml-common.h` and `ggml-quants.c` of ggml, which `gguf.quants` has in numpy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

from ...quantize.layouts import CHUNK_VALUES, BlockValues, QuantizedWeight, pack, stacked
from ...scratch import spooled

#: Codes by what IQ4 stores.
_IQ4_CODES = (np.array(IQ4_NL.kvalues) + 128).astype(np.uint8)


@dataclass(frozen=True)
class _Part:
    """Some rows of a weight.

    Attributes:
        codes: as ggml has them, or with the middle code for 0; uint8 `[rows, columns]`.
        scales: of their blocks.
        minimums: what is added.
    """

    codes: np.ndarray
    scales: BlockValues
    minimums: BlockValues | None = None


@dataclass(frozen=True)
class _Layout:
    """How a type stores a weight.

    Attributes:
        bits: of the codes that it becomes.
        block_size: columns that share a scale.
        read: the blocks of some rows, uint8 `[rows, blocks, bytes]`, each as ggml has it.
        up: added to every code, so that codes of fewer bits lie around the middle, which stands for 0; beside
            minimums it is what ggml's 0 becomes. A product reads codes from the middle, and what it is moved
            by, and subtracts again, is no larger than what it computes.
    """

    bits: int
    block_size: int
    read: Callable[[np.ndarray], _Part]
    up: int = 0


def has_layout(kind: GGMLQuantizationType) -> bool:
    """Whether weights of a type can be kept as they are."""
    return kind in _LAYOUTS


def quantized_weight(
    stored: np.ndarray, kind: GGMLQuantizationType, order: np.ndarray | None = None
) -> QuantizedWeight:
    """A tensor of a GGUF file, to the last bit.

    Args:
        stored: uint8 `[rows, bytes of a row]`, as the file has it; read some rows at a time.
        kind: of which `has_layout`.
        order: int64 `[rows]`, for every row of the weight the one of `stored` that it is; None: the same.

    Raises:
        ExportError: the folder of temporary files has no room.
    """
    layout = _LAYOUTS[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = len(stored) if order is None else len(order), stored.shape[1] // block_bytes * block
    step = max(1, CHUNK_VALUES // columns)
    scales, minimums = list[BlockValues](), list[BlockValues]()

    def packed() -> Iterator[torch.Tensor]:
        for row in range(0, rows, step):
            chosen = slice(row, row + step) if order is None else order[row : row + step]
            part = layout.read(np.asarray(stored[chosen]).reshape(-1, columns // block, block_bytes))
            scales.append(part.scales)
            minimums.extend([] if part.minimums is None else [part.minimums])
            yield torch.from_numpy(pack(part.codes + np.uint8(layout.up), layout.bits))

    codes = spooled((rows, columns * layout.bits // 8), torch.uint8, packed())
    return QuantizedWeight(
        codes.numpy(),
        stacked(scales),
        layout.bits,
        layout.block_size,
        zero_points=np.full((rows, columns // layout.block_size), layout.up, np.uint8) if minimums else None,
        minimums=stacked(minimums) if minimums else None,
    )


def _halves(blocks: np.ndarray, first: int) -> np.ndarray:
    """The float16 at byte `first` of every block, `[rows, blocks]`."""
    return blocks[..., first : first + 2].copy().view("<f2")[..., 0]


def _fields(stored: np.ndarray, width: int, bits: int) -> np.ndarray:
    """The numbers of `bits` bits in `width` bytes at a time, the low ones of all these bytes first.

    Args:
        stored: uint8 `[…, bytes]`.

    Returns:
        uint8 `[…, bytes * 8 / bits]`.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found = stored.reshape(*stored.shape[:-1], -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return np.asarray(found).reshape(*stored.shape[:-1], -1)


def _flat(values: np.ndarray) -> np.ndarray:
    """Values of blocks, `[rows, blocks, n]`, of rows."""
    return np.ascontiguousarray(values).reshape(len(values), -1)


def _q4_0(blocks: np.ndarray) -> _Part:
    return _Part(_flat(_fields(blocks[..., 2:], 16, 4)), BlockValues(_halves(blocks, 0)))


def _q4_1(blocks: np.ndarray) -> _Part:
    return _Part(
        _flat(_fields(blocks[..., 4:], 16, 4)),
        BlockValues(_halves(blocks, 0)),
        BlockValues(_halves(blocks, 2)),
    )


def _five_bits(stored: np.ndarray) -> np.ndarray:
    """Codes whose fifth bits, 4 bytes, lie before the other four."""
    high = np.unpackbits(stored[..., :4], axis=-1, bitorder="little")
    return np.asarray(_fields(stored[..., 4:], 16, 4) | high << 4)


def _q5_0(blocks: np.ndarray) -> _Part:
    return _Part(_flat(_five_bits(blocks[..., 2:])), BlockValues(_halves(blocks, 0)))


def _q5_1(blocks: np.ndarray) -> _Part:
    return _Part(
        _flat(_five_bits(blocks[..., 4:])), BlockValues(_halves(blocks, 0)), BlockValues(_halves(blocks, 2))
    )


def _q8_0(blocks: np.ndarray) -> _Part:
    return _Part(_flat(blocks[..., 2:] ^ np.uint8(128)), BlockValues(_halves(blocks, 0)))


def _iq4_nl(blocks: np.ndarray) -> _Part:
    return _Part(_flat(_IQ4_CODES[_fields(blocks[..., 2:], 16, 4)]), BlockValues(_halves(blocks, 0)))


def _q2_k(blocks: np.ndarray) -> _Part:
    numbers = blocks[..., :16]
    return _Part(
        _flat(_fields(blocks[..., 16:80], 32, 2)),
        BlockValues(_flat(numbers & 15), _halves(blocks, 80)),
        BlockValues(_flat(numbers >> 4), -_halves(blocks, 82)),
    )


def _q3_k(blocks: np.ndarray) -> _Part:
    codes = _fields(blocks[..., 32:96], 32, 2) | _fields(blocks[..., :32], 32, 1) << 2
    scales = _fields(blocks[..., 96:104], 8, 4) | _fields(blocks[..., 104:108], 4, 2) << 4
    return _Part(
        _flat(codes),
        BlockValues(_flat(scales.view(np.int8) - np.int8(32)), _halves(blocks, 108)),
    )


def _scales_and_minimums(blocks: np.ndarray) -> tuple[BlockValues, BlockValues]:
    """Those of Q4_K and Q5_K: two bits of each of the last four are the highest of the first four's bytes."""
    low, middle, high = (blocks[..., first : first + 4] for first in (4, 8, 12))
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    minimums = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    return (
        BlockValues(_flat(scales), _halves(blocks, 0)),
        BlockValues(_flat(minimums), -_halves(blocks, 2)),
    )


def _q4_k(blocks: np.ndarray) -> _Part:
    return _Part(_flat(_fields(blocks[..., 16:], 32, 4)), *_scales_and_minimums(blocks))


def _q5_k(blocks: np.ndarray) -> _Part:
    codes = _fields(blocks[..., 48:], 32, 4) | _fields(blocks[..., 16:48], 32, 1) << 4
    return _Part(_flat(codes), *_scales_and_minimums(blocks))


def _q6_k(blocks: np.ndarray) -> _Part:
    codes = _fields(blocks[..., :128], 64, 4) | _fields(blocks[..., 128:192], 32, 2) << 4
    return _Part(
        _flat(codes),
        BlockValues(_flat(blocks[..., 192:208]).view(np.int8), _halves(blocks, 208)),
    )


def _iq4_xs(blocks: np.ndarray) -> _Part:
    # The low four bits of two scales are in each byte, the high two of all eight in the two bytes before.
    scales = _fields(blocks[..., 4:8], 1, 4) | _fields(blocks[..., 2:4], 1, 2) << 4
    return _Part(
        _flat(_IQ4_CODES[_fields(blocks[..., 8:], 16, 4)]),
        BlockValues(_flat(scales.view(np.int8) - np.int8(32)), _halves(blocks, 0)),
    )


_LAYOUTS = {
    GGMLQuantizationType.Q4_0: _Layout(4, 32, _q4_0),
    GGMLQuantizationType.Q4_1: _Layout(4, 32, _q4_1),
    GGMLQuantizationType.Q5_0: _Layout(8, 32, _q5_0, up=128 - 16),
    GGMLQuantizationType.Q5_1: _Layout(8, 32, _q5_1, up=128 - 16),
    GGMLQuantizationType.Q8_0: _Layout(8, 32, _q8_0),
    GGMLQuantizationType.Q2_K: _Layout(4, 16, _q2_k, up=8 - 2),
    GGMLQuantizationType.Q3_K: _Layout(4, 16, _q3_k, up=8 - 4),
    GGMLQuantizationType.Q4_K: _Layout(4, 32, _q4_k),
    GGMLQuantizationType.Q5_K: _Layout(8, 32, _q5_k, up=128 - 16),
    GGMLQuantizationType.Q6_K: _Layout(8, 16, _q6_k, up=128 - 32),
    GGMLQuantizationType.IQ4_NL: _Layout(8, 32, _iq4_nl),
    GGMLQuantizationType.IQ4_XS: _Layout(8, 32, _iq4_xs),
}
