"""GPTQ as AutoGPTQ and GPTQModel store it.

    w[n, k] = (q[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]

with `qweight` int32 `[K * bits / 32, N]`, whose words hold codes that follow each other along K, the first in
the lowest bits; `qzeros` int32 `[groups, N * bits / 32]`, packed so along N; `scales` float16 `[groups, N]`;
and `g_idx` int32 `[K]`. The first version of the format has 1 taken from every zero, from the words as they
are: a zero of 0 borrows from the next, and adding 1 to each gives all of them back.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quantize.layouts import QuantizedWeight
from .blocks import equal_groups, in_blocks, unpack_words
from .layout import Layout
from .tensors import FLOATS, CheckpointTensors

#: 1 for every code of a word.
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


class GptqLayout(Layout):
    """See `Layout`. With act-order (`desc_act`) the columns are sorted by group."""

    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, tensors: CheckpointTensors, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, settings)
        self._bits: int = self.choice("bits", (4, 8))
        name = "checkpoint_format" if "checkpoint_format" in settings else "format"
        self._borrowed = self.choice(name, ("gptq", "gptq_v2"), "gptq") == "gptq"

    def weight(self, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """See `Layout`."""
        bits, (rows, columns) = self._bits, shape
        size = self.group_size(module, columns)
        count = -(-columns // size)
        words = self.tensors.array(f"{module}.qweight", ["I32"], [-(-columns * bits // 32), rows])
        scales = self.tensors.array(f"{module}.scales", FLOATS, [count, rows])
        # The bytes of a word are what four columns (8 bits) or eight are packed to here.
        packed = words.view(np.uint8).reshape(len(words), rows, 4).transpose(1, 0, 2).reshape(rows, -1)
        groups, order = self._groups(module, columns, size, count)
        return in_blocks(
            packed,
            bits,
            groups,
            self.block_size(module, groups),
            scales.T,
            zero_points=self._zero_points(module, count, rows),
            order=order,
        )

    def _zero_points(self, module: str, count: int, rows: int) -> np.ndarray:
        words = self.tensors.array(f"{module}.qzeros", ["I32"], [count, -(-rows * self._bits // 32)])
        if self._borrowed:
            words = words.view(np.uint32) + _ONES[self._bits]
        return unpack_words(words, self._bits)[:, :rows].T

    def _groups(
        self, module: str, columns: int, size: int, count: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The group of each column, sorted, and the order that sorts them where it is not theirs."""
        name = f"{module}.g_idx"
        if name not in self.tensors:
            if self.settings.get("desc_act"):
                raise self.tensors.error(name, "is not there, and desc_act says that columns are reordered")
            return equal_groups(columns, size), None
        groups = self.tensors.array(name, ["I32", "I64"], [columns]).astype(np.int64)
        if groups.min() < 0 or groups.max() >= count:
            raise self.tensors.error(name, f"names groups outside 0…{count - 1}")
        order = np.argsort(groups, kind="stable")
        return groups[order], None if (np.diff(groups) >= 0).all() else order
