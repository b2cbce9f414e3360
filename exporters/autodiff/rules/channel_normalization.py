"""Normalization per channel or group, with batch statistics frozen, and without parameters."""

from __future__ import annotations

import onnx_ir as ir

from ..context import RuleContext
from ..registry import RULES, RuleResult

rule = RULES.rule


def _per_channel(c: RuleContext, value: ir.Value) -> ir.Value:
    """A vector `[C]` as `[C, 1, …]`, which broadcasts against `[N, C, …]`."""
    e = c.emit
    return e.unsqueeze(value, range(1, e.rank(c.input(0)) - 1))


def _over_channels(c: RuleContext, value: ir.Value) -> ir.Value:
    """Σ over all but the channels."""
    e = c.emit
    return e.sum(value, [0, *range(2, e.rank(c.input(0)))], keepdims=False)


class _Groups:
    """x `[N, C, …]` in groups of channels, normalized: `[N, groups, elements]`."""

    def __init__(self, c: RuleContext, groups: int | None) -> None:
        self.c, self.e, self.x = c, c.emit, c.input(0)
        e, x = self.e, self.x
        channels = e.shape(x)[1]
        self.grouped_shape = ir.Shape([e.shape(x)[0], channels if groups is None else groups, None])
        self.spec = e.int64([0, 0 if groups is None else groups, -1])

    def split(self, value: ir.Value) -> ir.Value:
        """`[N, C, …]` as `[N, groups, elements]`."""
        return self.e.op("Reshape", value, self.spec, dtype=value.dtype, shape=self.grouped_shape)

    def merge(self, value: ir.Value) -> ir.Value:
        """The inverse of `split`."""
        return self.e.op("Reshape", value, self.e.shape_of(self.x), like=self.x, allowzero=1)

    def normalized(self) -> tuple[ir.Value, ir.Value]:
        """x̂ and 1/√(variance + ε), grouped."""
        e, x = self.e, self.split(self.x)
        centred = e.sub(x, e.reduce("ReduceMean", x, [2], keepdims=True))
        variance = e.reduce("ReduceMean", e.mul(centred, centred), [2], keepdims=True)
        epsilon = e.scalar(self.c.attr_float("epsilon", 1e-5), x)
        inverse = e.unary("Reciprocal", e.unary("Sqrt", e.add(variance, epsilon)))
        return e.mul(centred, inverse), inverse

    def cotangents(self) -> RuleResult:
        """Of x, scale `[C]` and bias `[C]`."""
        c, e, dy = self.c, self.e, self.c.cotangent

        def into_x() -> ir.Value:
            x_hat, inverse = self.normalized()
            g = self.split(e.mul(dy, _per_channel(c, c.input(1))))
            centred = e.sub(g, e.reduce("ReduceMean", g, [2], keepdims=True))
            projection = e.reduce("ReduceMean", e.mul(g, x_hat), [2], keepdims=True)
            return self.merge(e.mul(inverse, e.sub(centred, e.mul(x_hat, projection))))

        def into_scale() -> ir.Value:
            return _over_channels(c, e.mul(dy, self.merge(self.normalized()[0])))

        return [into_x, into_scale, lambda: _over_channels(c, dy)]


@rule("InstanceNormalization", since=6, until=22)
def instance_normalization(c: RuleContext) -> RuleResult:
    """per sample and channel, g = ȳ·s:  x̄ = r·(g − mean(g) − x̂·mean(g·x̂)),  s̄ = Σ ȳ·x̂,  b̄ = Σ ȳ"""
    return _Groups(c, None).cotangents()


@rule("GroupNormalization", since=21, until=21)
def group_normalization(c: RuleContext) -> RuleResult:
    """per sample and group, g = ȳ·s:  x̄ = r·(g − mean(g) − x̂·mean(g·x̂)),  s̄ = Σ ȳ·x̂,  b̄ = Σ ȳ"""
    return _Groups(c, c.attr_int("num_groups", 1)).cotangents()


def _training_refusal(node: ir.Node) -> str | None:
    if "training_mode" in node.attributes and node.attributes["training_mode"].as_int():
        return "training_mode is set: export the model in eval mode, with frozen statistics"
    return None


@rule("BatchNormalization", since=14, until=15, differentiable=(0, 1, 2), refuses=_training_refusal)
def batch_normalization(c: RuleContext) -> RuleResult:
    """frozen mean μ and r = 1/√(variance + ε):  x̄ = ȳ·s·r,  s̄ = Σ ȳ·(x − μ)·r,  b̄ = Σ ȳ"""
    e, x, dy = c.emit, c.input(0), c.cotangent

    def inverse() -> ir.Value:
        variance = c.input(4)
        epsilon = e.scalar(c.attr_float("epsilon", 1e-5), variance)
        return e.unary("Reciprocal", e.unary("Sqrt", e.add(variance, epsilon)))

    def into_scale() -> ir.Value:
        centred = e.sub(x, _per_channel(c, c.input(3)))
        return e.mul(_over_channels(c, e.mul(dy, centred)), inverse())

    return [
        lambda: e.mul(dy, _per_channel(c, e.mul(c.input(1), inverse()))),
        into_scale,
        lambda: _over_channels(c, dy),
    ]


@rule("LpNormalization", since=1, until=22)
def lp_normalization(c: RuleContext) -> RuleResult:
    """p = 2: x̄ = (ȳ − y·Σ ȳ·y) / ‖x‖₂;  p = 1: x̄ = (ȳ − sign(x)·Σ ȳ·y) / ‖x‖₁;  0 where the norm is 0"""
    e, x, y, dy = c.emit, c.input(0), c.output, c.cotangent
    axis = c.attr_int("axis", -1)

    def operand() -> ir.Value:
        euclidean = c.attr_int("p", 2) == 2
        norm = e.reduce("ReduceL2" if euclidean else "ReduceL1", x, [axis], keepdims=True)
        direction = y if euclidean else e.unary("Sign", x)
        zero = e.scalar(0, x)
        moved = e.div(e.sub(dy, e.mul(direction, e.sum(e.mul(dy, y), [axis]))), norm)
        return e.where(e.compare("Equal", norm, zero), zero, moved)

    return [operand]


@rule("MeanVarianceNormalization", since=9, until=13)
def mean_variance_normalization(c: RuleContext) -> RuleResult:
    """σ = standard deviation:  x̄ = (ȳ − mean(ȳ)) / (σ + 10⁻⁹) − y·mean(ȳ·y) / σ"""
    e, x, y, dy = c.emit, c.input(0), c.output, c.cotangent
    axes = list(c.attr_ints("axes") or (0, 2, 3))

    def operand() -> ir.Value:
        centred = e.sub(x, e.reduce("ReduceMean", x, axes, keepdims=True))
        deviation = e.unary("Sqrt", e.reduce("ReduceMean", e.mul(centred, centred), axes, keepdims=True))
        spread = e.div(
            e.sub(dy, e.reduce("ReduceMean", dy, axes, keepdims=True)), e.add(deviation, e.scalar(1e-9, x))
        )
        projection = e.div(e.reduce("ReduceMean", e.mul(dy, y), axes, keepdims=True), deviation)
        return e.sub(spread, e.mul(y, projection))

    return [operand]
