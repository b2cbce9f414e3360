"""Convolutions and pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..harness import Case
from .arrays import distinct, normal

F = torch.nn.functional
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _pads(before: list[int], after: list[int]) -> list[int]:
    """Padding as torch's `pad` wants it: last axis first, before and after."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]


def _conv(spatial: int, attributes: dict[str, Any]) -> Callable[..., Any]:
    def function(x: Any, w: Any, b: Any = None) -> Any:
        pads = attributes.get("pads", [0] * 2 * spatial)
        padded = F.pad(x, _pads(pads[:spatial], pads[spatial:]))
        return CONV[spatial](
            padded,
            w,
            b,
            stride=attributes.get("strides", 1),
            dilation=attributes.get("dilations", 1),
            groups=attributes.get("group", 1),
        )

    return function


def _transposed(spatial: int, attributes: dict[str, Any]) -> Callable[..., Any]:
    def function(x: Any, w: Any, b: Any = None) -> Any:
        pads = attributes.get("pads", [0] * 2 * spatial)
        return TRANSPOSED[spatial](
            x,
            w,
            b,
            stride=attributes.get("strides", 1),
            padding=pads[:spatial],
            output_padding=attributes.get("output_padding", 0),
            dilation=attributes.get("dilations", 1),
            groups=attributes.get("group", 1),
        )

    return function


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 1, 4), (1, 1, 2), {}),
    ((2, 2, 5), (3, 2, 3), {"strides": [2], "pads": [1, 1]}),
    ((1, 4, 6), (2, 2, 3), {"strides": [2], "group": 2}),
    ((2, 2, 6), (2, 1, 3), {"dilations": [2], "pads": [2, 1], "group": 2}),
    ((1, 2, 4, 4), (2, 2, 2, 2), {}),
    ((2, 2, 4, 5), (4, 1, 2, 3), {"strides": [2, 1], "pads": [1, 0, 0, 1], "group": 2}),
    ((1, 1, 5, 4), (2, 1, 2, 2), {"strides": [2, 3], "dilations": [1, 2]}),
    ((1, 3, 4, 4), (2, 3, 4, 4), {"strides": [4, 4]}),
    ((1, 1, 3, 2, 2), (1, 1, 2, 1, 2), {}),
]
TRANSPOSES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 2, 3), (2, 1, 2), {}),
    ((2, 2, 3), (2, 3, 3), {"strides": [2], "pads": [1, 1], "output_padding": [1]}),
    ((1, 4, 3), (4, 1, 2), {"strides": [2], "group": 2}),
    ((1, 2, 2, 3), (2, 2, 2, 2), {"strides": [2, 1], "dilations": [1, 2]}),
    ((1, 1, 2, 2), (1, 2, 3, 3), {"pads": [1, 1, 1, 1]}),
]


def cases() -> Iterator[Case]:
    for op, table, make in (("Conv", CONVOLUTIONS, _conv), ("ConvTranspose", TRANSPOSES, _transposed)):
        for shape, kernel, attributes in table:
            spatial = len(shape) - 2
            features = kernel[0] if op == "Conv" else kernel[1] * attributes.get("group", 1)
            symbolic = (0, *range(2, 2 + spatial))
            x, w, b = normal(*shape), normal(*kernel, seed=1), normal(features, seed=2)
            function = make(spatial, attributes)
            # The kernel is a parameter, its size static; only images have symbolic sizes.
            # onnx's reference evaluator gets groups wrong.
            common = {"symbolic_axes": symbolic, "float64": "group" not in attributes}
            yield Case(op, (x, w, b), function, attributes, static_inputs=(1, 2), **common)
            yield Case(op, (x, w), function, attributes, static_inputs=(1,), **common)
    yield Case(
        "Conv",
        (normal(1, 1, 5), normal(1, 1, 3, seed=1)),
        _conv(1, {"pads": [1, 1], "strides": [2]}),
        {"auto_pad": "SAME_UPPER", "strides": [2]},
        symbolic_axes=(0,),
        label="same",
    )
    yield Case(
        "Conv",
        (normal(1, 1, 4), normal(1, 1, 2, seed=1)),
        _conv(1, {"pads": [1, 0]}),
        {"auto_pad": "SAME_LOWER"},
        symbolic_axes=(0,),
        label="same",
    )
    yield Case(
        "Conv",
        (normal(1, 1, 4), normal(1, 1, 2, seed=1)),
        _conv(1, {}),
        {"auto_pad": "VALID"},
        static_inputs=(1,),
    )
    yield from _pools()


def _pools() -> Iterator[Case]:
    for shape, function, attributes in (
        ((1, 2, 6), lambda x: F.max_pool1d(x, 2), {"kernel_shape": [2], "strides": [2]}),
        ((2, 1, 4, 5), lambda x: F.max_pool2d(x, 3, 1, 1), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        (
            (1, 1, 5, 5),
            lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
            {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
        ),
        ((1, 1, 6), lambda x: F.max_pool1d(x, 2, 1, dilation=2), {"kernel_shape": [2], "dilations": [2]}),
    ):
        yield Case("MaxPool", (distinct(*shape),), function, attributes)
    for shape, function, attributes in (
        ((1, 2, 6), lambda x: F.avg_pool1d(x, 2), {"kernel_shape": [2], "strides": [2]}),
        ((1, 2, 5), lambda x: F.avg_pool1d(x, 2, 2), {"kernel_shape": [2], "strides": [2]}),
        (
            (2, 2, 4, 5),
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        ),
        (
            (1, 1, 4, 5),
            lambda x: F.avg_pool2d(x, 3, 1, 1),
            {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        ),
    ):
        yield Case("AveragePool", (normal(*shape),), function, attributes)
    yield from _lp_pool()
    for shape in ((2, 3, 4), (1, 2, 2, 3), (1, 1, 2, 2, 2)):
        axes = tuple(range(2, len(shape)))
        yield Case("GlobalAveragePool", (normal(*shape),), lambda x, a=axes: x.mean(a, keepdim=True))
        yield Case("GlobalMaxPool", (distinct(*shape),), lambda x, a=axes: x.amax(a, keepdim=True))


def _lp_pool() -> Iterator[Case]:
    """float32 only in onnxruntime; torch pools |x|^p itself, since its own takes a root of the sum of x^p."""
    for shape, kernel, stride, pad, dilation, p in (
        ((1, 2, 6), [2], [2], 0, 1, 2),
        ((2, 2, 5), [3], [1], 1, 1, 2),
        ((1, 2, 7), [2], [2], 0, 2, 2),
        ((2, 1, 4, 5), [2, 3], [1, 2], 1, 1, 2),
        ((1, 2, 6), [3], [1], 0, 1, 1),
        ((1, 1, 4, 4), [2, 2], [2, 2], 0, 1, 3),
    ):

        def function(
            x: Any, k: Any = kernel, s: Any = stride, a: Any = pad, d: Any = dilation, p: Any = p
        ) -> Any:
            ones = torch.ones(x.shape[1], 1, *k, dtype=x.dtype)
            convolve = F.conv1d if len(k) == 1 else F.conv2d
            summed = convolve(x.abs() ** p, ones, None, s, a, d, x.shape[1])
            return summed ** (1 / p)

        spatial = len(kernel)
        attributes = {"kernel_shape": kernel, "strides": stride, "p": p, "pads": [pad] * 2 * spatial}
        attributes["dilations"] = [dilation] * spatial
        yield Case("LpPool", (distinct(*shape),), function, attributes,
                   float64=False, linear=False, tolerance=1e-4)  # fmt: skip
