"""bitsandbytes: NF4 and FP4, and 8 bits (LLM.int8).

4 bits: `weight` uint8 `[N * K / 2, 1]` (or the same bytes as another type), `weight.absmax` float32 a block,
and what they are in JSON. With double quantization `weight.absmax` is uint8 and

    absmax[i] = nested_quant_map[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset

8 bits: `weight` int8 `[N, K]` and `SCB` float32 `[N]`, the largest magnitude of each row: w = q * SCB / 127.
The columns that LLM.int8 multiplies in float16, as large inputs come, have codes as all others.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...quantize.layouts import QuantizedWeight, kept
from ...quantize.table_weight import FP4, NF4, TABLES, StoredWeight, TableWeight
from .blocks import equal_groups, in_blocks, packed_signed
from .layout import Layout
from .tensors import CheckpointTensors

_STATE = "weight.quant_state.bitsandbytes__"
_TYPES = {"fp4": FP4, "nf4": NF4}
#: Block sizes of `MatMulBnb4`.
_BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytesLayout(Layout):
    """See `Layout`."""

    parts = frozenset(
        {
            "weight",
            "SCB",
            "weight_format",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            *(f"{_STATE}{kind}" for kind in _TYPES),
        }
    )

    def __init__(self, tensors: CheckpointTensors, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, settings)
        self.marker = "SCB"
        if settings.get("load_in_4bit"):
            self.marker = f"{_STATE}{self.choice('bnb_4bit_quant_type', tuple(_TYPES), 'fp4')}"

    def weight(self, module: str, shape: tuple[int, int]) -> StoredWeight:
        """See `Layout`."""
        return self._of_rows(module, shape) if self.marker == "SCB" else self._of_table(module, shape)

    def _of_rows(self, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        rows, columns = shape
        values = self.tensors.array(f"{module}.weight", ["I8"], shape)
        largest = self.tensors.array(f"{module}.SCB", ["F32"], [rows])
        arranged = f"{module}.weight_format"
        if arranged in self.tensors and self.tensors.read(arranged).any():
            raise self.tensors.error(arranged, "is not 0: the rows are in the order of a GPU")
        groups = equal_groups(columns, columns)
        block_size = self.block_size(module, groups)
        scales = (largest / np.float32(127))[:, None]
        return in_blocks(packed_signed(values, 8), 8, groups, block_size, scales)

    def _of_table(self, module: str, shape: tuple[int, int]) -> TableWeight:
        name = f"{module}.{self.marker}"
        state = self.tensors.json_object(name)
        size = state.get("blocksize")
        if state.get("shape") != list(shape) or size not in _BLOCK_SIZES:
            raise self.tensors.error(
                name, f"has the shape {state.get('shape')} in blocks of {size}, expected {list(shape)}"
            )
        assert isinstance(size, int)
        count = shape[0] * shape[1]
        if count % size:
            raise self.tensors.error(name, f"has {count} weights, which blocks of {size} do not divide")
        packed = self.tensors.read(f"{module}.weight").contiguous().view(torch.uint8).reshape(-1)
        if len(packed) * 2 != count:
            raise self.tensors.error(f"{module}.weight", f"has {len(packed)} bytes, expected {count // 2}")
        kind = _TYPES[self.marker.removeprefix(_STATE)]
        table = self.tensors.array(f"{module}.weight.quant_map", ["F32"], [16])
        if not np.allclose(table, TABLES[kind], rtol=0, atol=1e-6):
            raise self.tensors.error(f"{module}.weight.quant_map", "is another table than bitsandbytes'")
        absmax = self._absmax(module, count // size, state)
        return TableWeight(kept([packed.numpy()[None]])[0], kept([absmax[None]])[0], shape, size, kind)

    def _absmax(self, module: str, count: int, state: Mapping[str, Any]) -> np.ndarray:
        name = f"{module}.weight.absmax"
        if f"{module}.weight.nested_absmax" not in self.tensors:
            return self.tensors.array(name, ["F32"], [count])
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not isinstance(size, int) or size < 1 or not isinstance(offset, float | int):
            raise self.tensors.error(name, f"is nested in blocks of {size} with an offset of {offset}")
        codes = self.tensors.array(name, ["U8"], [count])
        table = self.tensors.array(f"{module}.weight.nested_quant_map", ["F32"], [256])
        factors = self.tensors.array(f"{module}.weight.nested_absmax", ["F32"], [-(-count // size)])
        values = table[codes] * factors[np.arange(count) // size] + np.float32(offset)
        return np.asarray(values)
