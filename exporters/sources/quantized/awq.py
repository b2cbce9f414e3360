"""AWQ as AutoAWQ stores it for its product "gemm".

    w[n, k] = (q[k, n] - zero[k // group_size, n]) * scales[k // group_size, n]

with `qweight` int32 `[K, N / 8]`, `qzeros` int32 `[groups, N / 8]` and `scales` float16 `[groups, N]`. Of
eight codes that follow each other along N, a word holds, from the lowest four bits up, those at 0 2 4 6 1 3 5
7. Zeros are there where they are symmetric (`zero_point` false), too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quantize.layouts import QuantizedWeight, pack
from .blocks import equal_groups, in_blocks
from .layout import Layout
from .tensors import FLOATS, CheckpointTensors

#: Where the codes of a word belong.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqLayout(Layout):
    """See `Layout`."""

    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, tensors: CheckpointTensors, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, settings)
        self.choice("bits", (4,))
        name = "version" if "version" in settings else "format"
        self.choice(name, ("gemm", "GEMM"), "gemm")

    def weight(self, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """See `Layout`."""
        rows, columns = shape
        groups = equal_groups(columns, self.group_size(module, columns))
        count = int(groups[-1]) + 1
        words = self.tensors.array(f"{module}.qweight", ["I32"], [columns, -(-rows // 8)])
        zeros = self.tensors.array(f"{module}.qzeros", ["I32"], [count, -(-rows // 8)])
        scales = self.tensors.array(f"{module}.scales", FLOATS, [count, rows])
        return in_blocks(
            pack(_codes(words)[:rows], 4),
            4,
            groups,
            self.block_size(module, groups),
            scales.T,
            zero_points=_codes(zeros)[:rows],
        )


def _codes(words: np.ndarray) -> np.ndarray:
    """uint8 `[N, K]` of int32 `[K, N / 8]`."""
    columns, count = words.shape
    codes = np.empty((count, 8, columns), np.uint8)
    for place, row in enumerate(ORDER):
        codes[:, row] = (words >> 4 * place & 15).T
    return codes.reshape(-1, columns)
