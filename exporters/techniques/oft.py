"""Insert OFT slots in front of linear layers, as rotations of blocks of what they read.

    x += x (R - I) by blocks;  R - I = 2Q + 2Q² + … + Q^k

Source: arXiv 2506.19847, the Cayley-Neumann parameterization; keys and sizes as PEFT has them.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError
from edgepeft.slots import Slot
from edgepeft.techniques import oft
from edgepeft.techniques.base import Settings

from ..graph import append, initializer
from ..options import ExportOptions
from ..passes.weights.linears import Linear
from ..sources.base import ModelSource
from .base import BaseGraph, InFrontOfLinear, activation_axes, reshaped


class Oft(InFrontOfLinear):
    """Its sites are linear modules."""

    name = oft.NAME

    def sites(self, base: BaseGraph, modules: Mapping[str, Settings]) -> list[tuple[Linear, Settings]]:
        """The linears of these names, with what they read."""
        found: list[tuple[Linear, Settings]] = [
            (linear, {**settings, oft.IN_FEATURES: linear.in_features})
            for linear, settings in super().sites(base, modules)
        ]
        for linear, settings in found:
            if oft.blocks(settings)[1] < 2:
                raise ExportError(
                    f"linear {linear.module} reads {linear.in_features} features in blocks of one, in which "
                    "there is nothing to rotate: choose larger blocks"
                )
        return found

    def fresh_modules(self, source: ModelSource, options: ExportOptions) -> dict[str, Settings]:
        """With PEFT's default block size, or as many blocks as the rank says, as PEFT's `r` does."""
        r = options.rank or 0
        settings = {oft.R: r, oft.BLOCK_SIZE: 0 if r else oft.DEFAULT_BLOCK_SIZE}
        own = settings | {oft.BLOCK_SHARE: False, oft.TERMS: 5}
        return dict.fromkeys(super().fresh_modules(source, options), own)

    def slot(self, linear: Linear, settings: Settings) -> Slot:
        return oft.new_slot(linear.module, settings, activation_axes(linear))

    def delta(self, graph: ir.Graph, slot: Slot, inputs: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
        count, size = oft.blocks(slot.settings)
        assert x.shape is not None
        lead, width = list(x.shape)[:-1], x.shape[-1]
        turn = _rotation(graph, inputs[oft.ROTATION], size, int(slot.settings[oft.TERMS]))
        parted = reshaped(graph, x, [0] * len(lead) + [count, size], [*lead, count, size])
        if slot.settings[oft.BLOCK_SHARE]:
            turn = reshaped(graph, turn, [size, size], [size, size])
            turned = append(graph, "MatMul", [parted, turn], shape=[*lead, count, size])
        else:  # blocks before what they have in common: one product a block
            axes = len(lead)
            order = [*range(axes - 1), axes, axes - 1, axes + 1]
            shape = [*lead[:-1], count, lead[-1], size]
            apart = append(graph, "Transpose", [parted], {"perm": order}, shape=shape)
            product = append(graph, "MatMul", [apart, turn], shape=shape)
            turned = append(graph, "Transpose", [product], {"perm": order}, shape=[*lead, count, size])
        return reshaped(graph, turned, [0] * len(lead) + [-1], [*lead, width])


GRAPH_TECHNIQUE = Oft()


def _rotation(graph: ir.Graph, rotation: ir.Value, size: int, terms: int) -> ir.Value:
    """`R - I` `[blocks, size, size]`, of as many terms of its series as PEFT's `_cayley_batch` adds."""
    assert rotation.shape is not None
    shape = [rotation.shape[0], size, size]
    skew = _skew(graph, rotation, size)
    two = initializer(graph, "float_2", np.array(2, np.float32))
    total = power = skew
    if terms > 2:
        power = append(graph, "MatMul", [skew, skew], shape=shape)
        total = append(graph, "Add", [total, power], shape=shape)
        for _ in range(3, terms - 1):
            power = append(graph, "MatMul", [power, skew], shape=shape)
            total = append(graph, "Add", [total, power], shape=shape)
    doubled = append(graph, "Mul", [total, two], shape=shape)
    if terms == 2:
        return doubled
    last = append(graph, "MatMul", [power, skew], shape=shape)
    return append(graph, "Add", [doubled, last], shape=shape)


def _skew(graph: ir.Graph, rotation: ir.Value, size: int) -> ir.Value:
    """Q `[blocks, size, size]`: the values above the diagonal, and below it with the other sign."""
    assert rotation.shape is not None
    rows, columns = np.triu_indices(size, 1)
    places, signs = np.zeros((size, size), np.int64), np.zeros((size, size), np.float32)
    places[rows, columns] = places[columns, rows] = np.arange(len(rows))
    signs[rows, columns], signs[columns, rows] = 1, -1
    shape = [rotation.shape[0], size, size]
    where = initializer(graph, f"skew_places_{size}", places)
    spread = append(graph, "Gather", [rotation, where], {"axis": -1}, shape=shape)
    return append(graph, "Mul", [spread, initializer(graph, f"skew_signs_{size}", signs)], shape=shape)
