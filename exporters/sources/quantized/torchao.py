"""torchao's integer tensors, as transformers saves them.

    w[n, k] = (q[n, k] - zero_point[n, k // group]) * scale[n, k // group]

`_weight_qdata` int8 `[N, K]`, at 4 bits one integer a byte, too; `_weight_scale` and `_weight_zero_point`
`[N, K / group]`. The header of a file notes which of torchao's classes a weight is of, with its attributes.
What is packed for one processor (`Int4Tensor` and others) is not read.
"""

import json
from typing import Any

import numpy as np

from ...quantize.layouts import QuantizedWeight
from .blocks import equal_groups, in_blocks, packed_signed, signed_codes
from .layout import Layout
from .tensors import FLOATS

_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


class TorchaoLayout(Layout):
    """See `Layout`."""

    marker = "_weight_qdata"
    parts = frozenset({"_weight_qdata", "_weight_scale", "_weight_zero_point"})

    def weight(self, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """See `Layout`."""
        noted = self._noted(module)
        bits = 4 if noted.get("target_dtype") == {"_type": "torch.dtype", "_data": "int4"} else 8
        size = noted.get("block_size")
        rows, columns = shape
        if not isinstance(size, list) or len(size) != 2 or size[0] != 1 or not 0 < int(size[1]) <= columns:
            raise self.tensors.error(f"{module}.weight", f"is in blocks of {size}, expected some of one row")
        groups = equal_groups(columns, int(size[1]))
        count = int(groups[-1]) + 1
        name = f"{module}._weight_qdata"
        values = self.tensors.array(name, ["I8"], shape)
        half = 2 ** (bits - 1)
        if bits == 4 and (values.min() < -half or values.max() >= half):
            raise self.tensors.error(name, f"holds integers outside {-half}…{half - 1}")
        scales = self.tensors.array(f"{module}._weight_scale", FLOATS, [rows, count])
        return in_blocks(
            packed_signed(values, bits),
            bits,
            groups,
            self.block_size(module, groups),
            scales,
            zero_points=self._zero_points(module, bits, (rows, count)),
        )

    def _noted(self, module: str) -> dict[str, Any]:
        name = f"{module}.weight"
        try:
            noted = json.loads(self.tensors.metadata[name])
            kind, attributes = noted["_type"], dict(noted["_data"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.tensors.error(name, "is not described in the header of its file") from error
        if kind not in _CLASSES:
            raise self.unknown(f"a {kind} ({name}), edgepeft reads {' and '.join(_CLASSES)}")
        return attributes

    def _zero_points(self, module: str, bits: int, shape: tuple[int, int]) -> np.ndarray | None:
        name = f"{module}._weight_zero_point"
        if name not in self.tensors:
            return None
        return signed_codes(self.tensors.array(name, ["I8"], shape), bits)
