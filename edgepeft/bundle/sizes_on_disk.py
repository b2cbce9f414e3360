"""How many bytes a tensor has on disk."""

import math
from collections.abc import Iterable

#: Bits of a value, by the dtypes that a bundle may hold.
DTYPE_BITS = {
    **dict.fromkeys(("float64", "int64", "uint64"), 64),
    **dict.fromkeys(("float32", "int32", "uint32"), 32),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 16),
    **dict.fromkeys(("int8", "uint8", "bool"), 8),
    **dict.fromkeys(("int4", "uint4"), 4),
    **dict.fromkeys(("int2", "uint2"), 2),
}
#: Types that numpy has not, whose values share bytes, with ONNX's number for each.
PACKED = {"uint4": 21, "int4": 22, "uint2": 25, "int2": 26}


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor on disk; types below 8 bits are packed."""
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
