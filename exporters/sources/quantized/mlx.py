"""mlx-lm's affine quantization.

    w[n, k] = q[n, k] * scales[n, k // group_size] + biases[n, k // group_size]

with `weight` uint32 `[N, K * bits / 32]`, the first code of a word in its lowest bits, and `scales` and
`biases` of the model's float type `[N, K / group_size]`. Modules may have settings of their own, by name; an
embedding is quantized too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quantize.layouts import QuantizedWeight
from .blocks import equal_groups, in_blocks
from .layout import Layout
from .tensors import FLOATS, CheckpointTensors


class MlxLayout(Layout):
    """See `Layout`."""

    marker = "scales"
    parts = frozenset({"weight", "scales", "biases"})

    def __init__(self, tensors: CheckpointTensors, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, settings)
        self.choice("bits", (4, 8))
        self.choice("mode", ("affine",), "affine")

    def weight(self, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """See `Layout`."""
        rows, columns = shape
        own = self.settings.get(module)
        if isinstance(own, dict):
            layout = MlxLayout(self.tensors, {**self.settings, module: None, **own})
            return layout.weight(module, shape)
        bits = self.settings["bits"]
        groups = equal_groups(columns, self.group_size(module, columns))
        count = int(groups[-1]) + 1
        words = self.tensors.array(f"{module}.weight", ["U32"], [rows, -(-columns * bits // 32)])
        scales, biases = (
            self.tensors.array(f"{module}.{part}", FLOATS, [rows, count]) for part in ("scales", "biases")
        )
        block_size = self.block_size(module, groups)
        packed = np.ascontiguousarray(words).view(np.uint8)
        return in_blocks(packed, bits, groups, block_size, scales, biases=biases)
