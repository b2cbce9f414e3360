"""Insert RoAd slots behind linear layers.

    y += y * (first - 1) + swapped(y) * second        first = a cos θ, second = ∓ a sin θ

where `swapped` has the halves of every group of outputs in each other's place.

Source: arXiv 2409.00119, equation 4; keys and groups as PEFT has them.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import LINEAR, Slot
from edgepeft.techniques import road
from edgepeft.techniques.base import Settings

from ..graph import append, initializer, put_behind
from ..options import ExportOptions
from ..passes.weights.linears import Linear, select, with_bias
from ..sources.base import ModelSource
from .base import BaseGraph, GraphTechnique, activation_axes, reshaped, shares_product, slot_inputs


class Road(GraphTechnique[tuple[Linear, Settings]]):
    """Its sites are linear modules."""

    name, site = road.NAME, LINEAR

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names."""
        found = [(linear, modules[name]) for name, linear in select(base.linears, modules).items()]
        for linear, settings in found:
            if shares_product(linear):
                raise ExportError(
                    f"linear {linear.module} is computed in one product with others, so RoAd cannot rotate "
                    "what it makes there: leave it out of the targets"
                )
            if linear.out_features % int(settings[road.GROUP_SIZE]):
                raise ExportError(
                    f"linear {linear.module} makes {linear.out_features} features, which are no multiple of "
                    f"group_size {settings[road.GROUP_SIZE]}: leave it out of the targets"
                )
        return found

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """With PEFT's default group size, or the largest that divides it and what every module makes."""
        found, sizes = super().fresh_modules(source, options), source.linear_sizes()
        group = math.gcd(road.DEFAULT_GROUP_SIZE, *(sizes[name][0] for name in found))
        if group % 2:
            raise ExportError(
                f"{source.name}: has modules that make an odd number of features, which RoAd cannot pair: "
                "say which it is to be on with --targets"
            )
        settings: Settings = {road.VARIANT: road.DEFAULT_VARIANT, road.GROUP_SIZE: group}
        return dict.fromkeys(found, settings)

    def insert(self, base: BaseGraph, sites: Sequence[tuple[Linear, Settings]]) -> list[Slot]:
        slots, graph = [], base.graph
        for linear, settings in sites:
            slot = road.new_slot(linear.module, linear.out_features, settings, activation_axes(linear))
            theta, alpha = slot_inputs(graph, slot)
            for node in linear.nodes:
                output = with_bias(node)
                if output.shape is None:
                    raise ExportError(
                        f"linear {linear.module}: the shape of its output is unknown, so it takes no RoAd"
                    )
                first, second = _factors(graph, slot, theta, alpha, len(output.shape))
                delta, reader = _delta(graph, int(settings[road.GROUP_SIZE]), output, first, second)
                put_behind(graph, output, "Add", delta, but=[reader])
            slots.append(slot)
        return slots


GRAPH_TECHNIQUE = Road()


def _factors(
    graph: ir.Graph, slot: Slot, theta: ir.Value, alpha: ir.Value, axes: int
) -> tuple[ir.Value, ir.Value]:
    """`first - 1` and `second` `[…, groups, 2 or 1, half]`, with the axes of the output in front."""
    half = int(slot.settings[road.GROUP_SIZE]) // 2
    of_pair = road.FACTORS[str(slot.settings[road.VARIANT])]
    (size,) = slot.tensor(road.THETA).sized(0)
    groups = size // (of_pair * half)
    lead = [-1] + [1] * (axes - 2) if slot.activation_axes else [1] * (axes - 1)
    known = [1] * (axes - 1)
    parts = []
    for value in (theta, alpha):
        if of_pair == 4:
            whole = reshaped(graph, value, [*lead, groups, 2, 2, half], [*known, groups, 2, 2, half])
            parts.append([_part(graph, whole, -3, place) for place in (0, 1)])
        else:
            parts.append(
                [reshaped(graph, value, [*lead, groups, of_pair, half], [*known, groups, of_pair, half])] * 2
            )
    (angle, other_angle), (scale, other_scale) = parts
    assert angle.shape is not None
    shape = list(angle.shape)
    one = initializer(graph, "one_float32", np.array(1, np.float32))
    first = append(graph, "Mul", [scale, append(graph, "Cos", [angle], shape=shape)], shape=shape)
    second = append(
        graph, "Mul", [other_scale, append(graph, "Sin", [other_angle], shape=shape)], shape=shape
    )
    signs = initializer(graph, "signs_of_halves", np.array([[-1], [1]], np.float32))
    signed = append(graph, "Mul", [second, signs], shape=[*shape[:-2], 2, half])
    return append(graph, "Sub", [first, one], shape=shape), signed


def _delta(
    graph: ir.Graph, group: int, output: ir.Value, first: ir.Value, second: ir.Value
) -> tuple[ir.Value, ir.Node]:
    """What is added to the output, and the node that reads it."""
    assert output.shape is not None
    lead, width = list(output.shape)[:-1], output.shape[-1]
    assert isinstance(width, int)
    kept, shape = [0] * len(lead), [*lead, width // group, 2, group // 2]
    parted = reshaped(graph, output, [*kept, width // group, 2, group // 2], shape)
    reader = parted.producer()
    assert reader is not None
    halves = [_part(graph, parted, -2, place, squeeze=False) for place in (1, 0)]
    swapped = append(graph, "Concat", halves, {"axis": -2}, shape=shape)
    own = append(graph, "Mul", [parted, first], shape=shape)
    others = append(graph, "Mul", [swapped, second], shape=shape)
    added = append(graph, "Add", [own, others], shape=shape)
    return reshaped(graph, added, [*kept, width], [*lead, width]), reader


def _part(graph: ir.Graph, value: ir.Value, axis: int, place: int, *, squeeze: bool = True) -> ir.Value:
    """One of two along an axis that is counted from the last."""
    assert value.shape is not None
    shape = list(value.shape)
    shape[axis] = 1
    ends = [
        initializer(graph, f"int64_{number}".replace("-", "minus_"), np.array([number], np.int64))
        for number in (place, place + 1, axis)
    ]
    part = append(graph, "Slice", [value, *ends], shape=shape)
    if not squeeze:
        return part
    return append(graph, "Squeeze", [part, ends[2]], shape=[*shape[:axis], *shape[axis + 1 :]])
