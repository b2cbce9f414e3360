"""compressed-tensors, as llm-compressor writes it: integers of 4 and 8 bits.

pack-quantized: `weight_packed` int32 `[N, K * bits / 32]` holds integers plus 2^(bits - 1), the first of a
word in its lowest bits; `weight_zero_point` int32 `[N * bits / 32, groups]` is packed so along N.
int-quantized: `weight` and `weight_zero_point` are int8. `weight_scale` is `[1]`, `[N, 1]` or `[N, groups]`;
`weight_g_idx` int32 `[K]` has the group of each column where these are reordered. How activations are rounded
is no property of a weight and is left out. Values of FP8 times a scale are no integers of 8 bits times one,
so those formats are not read.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quantize.layouts import QuantizedWeight
from .blocks import equal_groups, in_blocks, packed_signed, signed_codes, unpack_words
from .layout import Layout
from .tensors import FLOATS, CheckpointTensors

_FORMATS = ("pack-quantized", "int-quantized")
_STRATEGIES = ("tensor", "channel", "group")


class CompressedTensorsLayout(Layout):
    """See `Layout`. One checkpoint may hold both formats, and groups of several sizes."""

    marker = "weight_scale"
    parts = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"}
    )

    def __init__(self, tensors: CheckpointTensors, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, settings)
        self.choice("format", (*_FORMATS, "mixed-precision"))
        self.choice("quantization_status", ("compressed", None))
        for name in ("sparsity_config", "transform_config"):
            found = settings.get(name) or {}
            if found and not (isinstance(found, dict) and found.get("format") == "dense"):
                raise self.unknown(f"a {name}")
        declared = settings.get("config_groups")
        if not isinstance(declared, dict) or not declared:
            raise self.unknown(f"config_groups {declared!r}")
        schemes = [self._scheme(group) for group in declared.values()]
        self._bits = {scheme["num_bits"] for scheme in schemes}
        self._sizes = {scheme["group_size"] for scheme in schemes if scheme["strategy"] == "group"}

    def _scheme(self, group: Any) -> dict[str, Any]:
        scheme = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(scheme, dict):
            raise self.unknown("a group without weights")
        size, strategy = scheme.get("group_size"), scheme.get("strategy")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        kind, bits = scheme.get("type", "int"), scheme.get("num_bits", 8)
        if kind != "int" or bits not in (4, 8) or strategy not in _STRATEGIES:
            raise self.unknown(
                f"weights of type {kind} with {bits} bits a {strategy}, edgepeft reads int with 4 or 8"
            )
        declared = group.get("format")
        if declared not in (None, *_FORMATS):
            raise self.unknown(f"format {declared!r}")
        return {"num_bits": bits, "strategy": strategy, "group_size": size}

    def weight(self, module: str, shape: tuple[int, int]) -> QuantizedWeight:
        """See `Layout`."""
        rows, columns = shape
        scales = self._scales(module, shape)
        count = scales.shape[1]
        name = f"{module}.weight_packed"
        if name in self.tensors:
            bits = self._bits_of(name, columns)
            words = self.tensors.array(name, ["I32"], [rows, -(-columns * bits // 32)])
            said = self.tensors.array(f"{module}.weight_shape", ["I64", "I32"], [2])
            if said.tolist() != list(shape):
                raise self.tensors.error(
                    f"{module}.weight_shape", f"is {said.tolist()}, expected {list(shape)}"
                )
            packed = np.ascontiguousarray(words).view(np.uint8)
        else:
            # All integers of fewer bits are some of 8, too.
            bits, packed = 8, packed_signed(self.tensors.array(f"{module}.weight", ["I8"], shape), 8)
        groups, order = self._groups(module, columns, count)
        return in_blocks(
            packed,
            bits,
            groups,
            self.block_size(module, groups),
            scales,
            zero_points=self._zero_points(module, bits, rows, count),
            order=order,
        )

    def _bits_of(self, name: str, columns: int) -> int:
        width = self.tensors.shape(name)[-1]
        for bits in sorted(self._bits):
            if -(-columns * bits // 32) == width:
                return int(bits)
        raise self.tensors.error(
            name, f"has {width} words for {columns} columns, which are not {sorted(self._bits)} bits each"
        )

    def _scales(self, module: str, shape: tuple[int, int]) -> np.ndarray:
        """float16 or float32 `[rows, groups]`."""
        name = f"{module}.weight_scale"
        stored = self.tensors.shape(name)
        rows, columns = shape
        if stored == (1,):
            return np.broadcast_to(self.tensors.array(name, FLOATS, stored), (rows, 1))
        count = stored[-1] if stored else 0
        if count > 1 and (columns % count or columns // count not in self._sizes):
            raise self.tensors.error(
                name,
                f"has {count} groups for {columns} columns, expected groups of {self._sizes or 'one row'}",
            )
        return self.tensors.array(name, FLOATS, [rows, max(1, count)])

    def _groups(self, module: str, columns: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The group of each column, sorted, and the order that sorts them where it is not theirs."""
        name = f"{module}.weight_g_idx"
        in_order = equal_groups(columns, columns // count)
        if name not in self.tensors:
            return in_order, None
        groups = self.tensors.array(name, ["I32", "I64"], [columns]).astype(np.int64)
        if (groups == -1).all():  # nothing was noted
            return in_order, None
        if groups.min() < 0 or groups.max() >= count:
            raise self.tensors.error(name, f"names groups outside 0…{count - 1}")
        order = np.argsort(groups, kind="stable")
        return groups[order], None if (np.diff(groups) >= 0).all() else order

    def _zero_points(self, module: str, bits: int, rows: int, count: int) -> np.ndarray | None:
        name = f"{module}.weight_zero_point"
        if name not in self.tensors:
            return None
        if self.tensors.dtype(name) == "I32":
            words = self.tensors.array(name, ["I32"], [-(-rows * bits // 32), count])
            return unpack_words(words.T, bits)[:, :rows].T
        stored = self.tensors.shape(name)
        values = self.tensors.array(name, ["I8"], stored if stored == (1,) else [rows, count])
        return np.broadcast_to(signed_codes(values, bits), (rows, count))
