"""Convolutions over any number of spatial axes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_ir as ir

from ..context import RuleContext
from ..emitter import Emitter
from ..registry import RULES, RuleResult
from ..shapes import static_dims

rule = RULES.rule
INT64 = ir.DataType.INT64


@dataclass
class Convolution:
    """The geometry of y = conv(x, w): x `[N, C, …]`, w `[M, C/groups, kernel…]`, y `[N, M, …]`."""

    e: Emitter
    strides: list[int]
    dilations: list[int]
    kernel: list[int]
    before: list[int]
    after: list[int]
    groups: int

    @cached_property
    def spatial(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    def attributes(self, *, pads: list[int], strides: list[int], dilations: list[int]) -> dict[str, Any]:
        """Attributes of a convolution node."""
        return {"pads": pads, "strides": strides, "dilations": dilations}

    def forward(self, x: ir.Value, w: ir.Value, like: ir.Value) -> ir.Value:
        """conv(x, w), in the shape of `like`."""
        attributes = self.attributes(
            pads=[*self.before, *self.after], strides=self.strides, dilations=self.dilations
        )
        return self.e.op("Conv", x, w, like=like, group=self.groups, **attributes)

    def into_input(self, dy: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
        """x̄: the transposed convolution, cut or padded at the end to the size of x."""
        e = self.e
        dims = static_dims(e.shape(x), range(2, 2 + self.spatial))
        rows = static_dims(e.shape(dy), range(2, 2 + self.spatial))
        if dims is not None and rows is not None:
            reach = [
                (n - 1) * s + (k - 1) * d + 1
                for n, s, k, d in zip(rows, self.strides, self.kernel, self.dilations, strict=True)
            ]
            rest = [n + b + a - r for n, b, a, r in zip(dims, self.before, self.after, reach, strict=True)]
            attributes = self.attributes(
                pads=[*self.before, *self.after], strides=self.strides, dilations=self.dilations
            )
            if any(rest):
                attributes["output_padding"] = rest
            return e.op("ConvTranspose", dy, w, like=x, group=self.groups, **attributes)
        attributes = self.attributes(
            pads=[*self.before, *[0] * self.spatial], strides=self.strides, dilations=self.dilations
        )
        shape = ir.Shape([*e.shape(x)[:2], *[None] * self.spatial])
        spread = e.op("ConvTranspose", dy, w, dtype=x.dtype, shape=shape, group=self.groups, **attributes)
        return self._fit(spread, x)

    def _fit(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Pads with zeros, or cuts, the end of each spatial axis."""
        e, n = self.e, self.spatial
        ends = ir.Shape([n])
        have = e.op("Shape", value, dtype=INT64, shape=ends, start=2)
        want = e.op("Shape", like, dtype=INT64, shape=ends, start=2)
        pads = e.concat([e.int64([0] * n), e.sub(want, have)], axis=0)
        return e.op("Pad", value, pads, None, e.int64(list(range(2, 2 + n))), like=like)

    def into_weight(self, x: ir.Value, dy: ir.Value, w: ir.Value) -> ir.Value:
        """w̄: the convolution of x with ȳ, batch and channels exchanged, strides and dilations too."""
        e, n = self.e, self.spatial
        swap = [1, 0, *range(2, 2 + n)]
        images = e.transpose(x, swap) if self.groups == 1 else self._grouped(x)
        attributes = self.attributes(
            pads=[*self.before, *self.after], strides=self.dilations, dilations=self.strides
        )
        channels, width = e.shape(w)[:2]
        shape = ir.Shape([width, channels, *[None] * n])
        taps = e.op(
            "Conv", images, e.transpose(dy, swap), dtype=x.dtype, shape=shape, group=self.groups, **attributes
        )
        # Where the last window does not end with the input, there are more taps than the kernel has.
        cut = e.op(
            "Slice",
            taps,
            e.int64([0] * n),
            e.int64(self.kernel),
            e.int64(list(range(2, 2 + n))),
            dtype=x.dtype,
            shape=ir.Shape([width, channels, *self.kernel]),
        )
        return e.op("Transpose", cut, like=w, perm=swap)

    def _grouped(self, x: ir.Value) -> ir.Value:
        """`[N, G·C, …]` as `[C, G·N, …]`."""
        e, n, dims = self.e, self.spatial, self.e.shape(x)
        rest = e.op("Shape", x, dtype=INT64, shape=ir.Shape([n]), start=2)
        batch, channels = e.dim_of(x, 0), e.dim_of(x, 1)
        groups = e.int64([self.groups])
        width = e.binary("Div", channels, groups)
        split = e.concat([batch, groups, width, rest], axis=0)
        parts_shape = ir.Shape([dims[0], self.groups, None, *dims[2:]])
        parts = e.op("Reshape", x, split, dtype=x.dtype, shape=parts_shape)
        turned = e.transpose(parts, [2, 1, 0, *range(3, 3 + n)])
        joined = e.concat([width, e.binary("Mul", batch, groups), rest], axis=0)
        return e.op("Reshape", turned, joined, dtype=x.dtype, shape=ir.Shape([None, None, *dims[2:]]))

    def into_bias(self, dy: ir.Value) -> ir.Value:
        """b̄ = Σ ȳ over all but the channels."""
        return self.e.sum(dy, [0, *range(2, 2 + self.spatial)], keepdims=False)


def spatial_list(node: ir.Node, name: str, default: list[int]) -> list[int]:
    """A per-axis attribute."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def padding(node: ir.Node, count: int, kernel: list[int]) -> tuple[list[int], list[int]] | None:
    """Padding before and after each spatial axis, or None where it depends on sizes unknown at export."""
    mode = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if mode == "VALID":
        return [0] * count, [0] * count
    if mode == "NOTSET":
        pads = spatial_list(node, "pads", [0] * (2 * count))
        return pads[:count], pads[count:]
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return None
    axes = range(2, 2 + count)
    dims, rows = static_dims(x.shape, axes), static_dims(y.shape, axes)
    if dims is None or rows is None:
        return None
    strides = spatial_list(node, "strides", [1] * count)
    dilations = spatial_list(node, "dilations", [1] * count)
    total = [
        max((o - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, o, s, k, d in zip(dims, rows, strides, kernel, dilations, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _kernel(node: ir.Node) -> list[int] | None:
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        return None
    return static_dims(weight.shape, range(2, weight.shape.rank()))


def _refusal(node: ir.Node) -> str | None:
    kernel = _kernel(node)
    if kernel is None:
        return "the size of its kernel is not static"
    if padding(node, len(kernel), kernel) is None:
        return "auto_pad=SAME needs static sizes: export with explicit pads"
    return None


def _transposed_refusal(node: ir.Node) -> str | None:
    if _kernel(node) is None:
        return "the size of its kernel is not static"
    mode = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if mode not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
        return "auto_pad=SAME and output_shape are not supported: export with explicit pads"
    return None


def _geometry(c: RuleContext) -> Convolution:
    kernel = _kernel(c.node) or []
    count = len(kernel)
    before, after = padding(c.node, count, kernel) or ([0] * count, [0] * count)
    return Convolution(
        e=c.emit,
        strides=spatial_list(c.node, "strides", [1] * count),
        dilations=spatial_list(c.node, "dilations", [1] * count),
        kernel=kernel,
        before=before,
        after=after,
        groups=c.attr_int("group", 1),
    )


@rule("Conv", since=11, until=22, refuses=_refusal)
def conv(c: RuleContext) -> RuleResult:
    """x̄ = convᵀ(ȳ, w),  w̄ = conv(x, ȳ) with batch and channels, strides and dilations exchanged,  b̄ = Σ ȳ"""
    g, x, w, dy = _geometry(c), c.input(0), c.input(1), c.cotangent
    return [
        lambda: g.into_input(dy, w, x),
        lambda: g.into_weight(x, dy, w),
        lambda: g.into_bias(dy),
    ]


@rule("ConvTranspose", since=11, until=22, refuses=_transposed_refusal)
def conv_transpose(c: RuleContext) -> RuleResult:
    """x̄ = conv(ȳ, w),  w̄ = conv(ȳ, x) with batch and channels, strides and dilations exchanged,  b̄ = Σ ȳ"""
    g, x, w, dy = _geometry(c), c.input(0), c.input(1), c.cotangent
    return [
        lambda: g.forward(dy, w, x),
        lambda: g.into_weight(dy, x, w),
        lambda: g.into_bias(dy),
    ]
