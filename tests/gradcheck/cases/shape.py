"""Operators that rearrange, repeat, cut or join."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..harness import Case
from .arrays import int64, normal


def cases() -> Iterator[Case]:
    for source, target in (
        ((2, 3), (3, 2)),
        ((2, 3), (-1,)),
        ((4,), (2, 1, 2)),
        ((1,), ()),
        ((0, 2), (2, 0)),
    ):
        shape = tuple(int(d) for d in np.empty(source).reshape(target).shape)
        yield Case(
            "Reshape",
            (normal(*source), np.array(target, np.int64)),
            lambda x, _, s=shape: x.reshape(s),
            {"allowzero": 1},
            constants=(1,),
        )
    yield Case("Reshape", (normal(2, 3, 2), int64(0, -1)), lambda x, _: x.reshape(2, 6), constants=(1,))
    for shape, axis, flat in (
        ((2, 3, 2), 1, (2, 6)),
        ((2, 3), 0, (1, 6)),
        ((2, 0, 2), 2, (0, 2)),
        ((3,), -1, (1, 3)),
    ):
        yield Case("Flatten", (normal(*shape),), lambda x, s=flat: x.reshape(s), {"axis": axis})
    for shape, axes, result in (
        ((1, 3), (0,), (3,)),
        ((2, 1, 3, 1), (1, -1), (2, 3)),
        ((1,), (0,), ()),
        ((1, 0), (0,), (0,)),
    ):
        yield Case(
            "Squeeze", (normal(*shape), int64(*axes)), lambda x, _, s=result: x.reshape(s), constants=(1,)
        )
    yield Case("Squeeze", (normal(1, 3, 1),), lambda x: x.reshape(3), label="all")
    for shape, axes, result in (((3,), (0,), (1, 3)), ((), (0,), (1,)), ((2, 3), (1, -1), (2, 1, 3, 1))):
        yield Case(
            "Unsqueeze", (normal(*shape), int64(*axes)), lambda x, _, s=result: x.reshape(s), constants=(1,)
        )
    for shape, permutation in (
        ((2, 3), (1, 0)),
        ((2, 3, 1), (2, 0, 1)),
        ((1, 2, 3, 2, 1), (4, 2, 0, 1, 3)),
        ((3,), (0,)),
    ):
        yield Case(
            "Transpose", (normal(*shape),), lambda x, p=permutation: x.permute(p), {"perm": list(permutation)}
        )
    yield Case("Transpose", (normal(2, 3, 2),), lambda x: x.permute(2, 1, 0), label="reversed")
    for shape, target, result in (
        ((3,), (2, 3), (2, 3)),
        ((2, 1), (2, 3), (2, 3)),
        ((), (2, 2), (2, 2)),
        ((2, 1, 3), (2, 1), (2, 2, 3)),
        ((2, 3), (1,), (2, 3)),
        ((1, 2), (0, 2), (0, 2)),
    ):
        yield Case(
            "Expand", (normal(*shape), int64(*target)), lambda x, _, s=result: x.expand(s), constants=(1,)
        )
        yield Case(
            "Expand",
            (normal(*shape), int64(*target)),
            lambda x, _, s=result: x.expand(s),
            label="at-run-time",
        )
    for shapes, axis in (
        (((2,), (3,)), 0),
        (((2, 1), (2, 3), (2, 2)), -1),
        (((1, 2, 2), (1, 0, 2)), 1),
        (((2, 2),), 0),
    ):
        yield Case(
            "Concat",
            tuple(normal(*s, seed=i) for i, s in enumerate(shapes)),
            lambda *xs, a=axis: torch.cat(xs, a),
            {"axis": axis},
        )
    yield Case("Split", (normal(2, 4),), lambda x: x.split(2, 1), {"axis": 1, "num_outputs": 2}, outputs=2)
    yield Case("Split", (normal(5),), lambda x: x.split(2), {"num_outputs": 3}, outputs=3, label="uneven")
    yield Case(
        "Split",
        (normal(2, 3, 2), int64(1, 0, 2)),
        lambda x, _: x.split([1, 0, 2], 1),
        {"axis": -2},
        outputs=3,
        constants=(1,),
    )
    yield Case("Split", (normal(3),), lambda x: x.clone(), {"num_outputs": 1}, label="single")
    yield from _slices()


def _slices() -> Iterator[Case]:
    whole = slice(None)
    for shape, starts, ends, axes, steps, index in (
        ((5,), (1,), (3,), (0,), None, (slice(1, 3),)),
        ((4, 5), (1,), (2**62,), (-1,), (1,), (whole, slice(1, None))),
        ((4, 5), (-2, 1), (4, -1), (0, 1), None, (slice(-2, None), slice(1, -1))),
        ((2, 3), (0, -9), (2, 2), None, None, (whole, slice(0, 2))),
        ((2, 3), (2,), (2,), (1,), None, (whole, slice(2, 2))),
        ((2, 3), (9,), (99,), (1,), None, (whole, slice(9, 99))),
        ((0, 3), (1,), (3,), (1,), None, (whole, slice(1, 3))),
        ((1, 2, 1, 3, 2), (0, 1), (1, 3), (1, 3), None, (whole, slice(0, 1), whole, slice(1, 3))),
        ((6,), (0,), (6,), (0,), (2,), (slice(0, 6, 2),)),
        ((2, 7), (1,), (6,), (1,), (3,), (whole, slice(1, 6, 3))),
    ):
        inputs = [normal(*shape), int64(*starts), int64(*ends)]
        if axes is not None:
            inputs.append(int64(*axes))
        if steps is not None:
            inputs.append(int64(*steps))

        def function(x: torch.Tensor, *_: object, i: tuple[slice, ...] = index) -> torch.Tensor:
            return x[i]

        yield Case(
            "Slice", tuple(inputs), function, constants=tuple(range(1, len(inputs))), label=f"from{starts}"
        )
        yield Case("Slice", tuple(inputs), function, label=f"from{starts}-at-run-time")
    backwards = (normal(2, 4), int64(-1), int64(-(2**62)), int64(1), int64(-1))
    yield Case("Slice", backwards, lambda x, *_: x.flip(1), constants=(1, 2, 3, 4), label="backwards")
