"""Reading elements by index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..harness import Case
from .arrays import integers, normal


def _gather(x: torch.Tensor, indices: torch.Tensor, axis: int) -> torch.Tensor:
    flat = torch.index_select(x, axis, indices.reshape(-1).long() % max(x.shape[axis], 1))
    return flat.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def cases() -> Iterator[Case]:
    for shape, axis, index_shape in (
        ((4,), 0, (3,)),
        ((4,), 0, ()),
        ((4, 2), 0, (2, 3)),
        ((4, 2), 0, ()),
        ((2, 4), 1, (3,)),
        ((2, 4), 1, ()),
        ((2, 4), -1, (2, 2)),
        ((2, 3, 2), 1, (2, 2)),
        ((2, 3, 2), 1, ()),
        ((1, 2, 1, 3, 2), 3, (2,)),
        ((4, 2), 0, (0,)),
        ((4, 2), 1, (0,)),
        ((4, 0), 0, (2,)),
    ):
        size = shape[axis]
        indices = integers(-size, size, *index_shape)
        positive_axis = axis % len(shape)
        for dtype in (np.int64, np.int32):
            yield Case(
                "Gather",
                (normal(*shape), indices.astype(dtype)),
                lambda x, i, a=positive_axis: _gather(x, i, a),
                {"axis": axis},
                label=dtype.__name__,
            )
    for shape, axis, index_shape in (
        ((4,), 0, (6,)),
        ((3, 4), 1, (3, 1)),
        ((3, 4), -1, (2, 2)),
        ((3, 4), 0, (5, 4)),
        ((2, 1, 3), 2, (2, 1, 2)),
        ((1, 2, 1, 2, 3), 4, (1, 2, 1, 1, 1)),
        ((3, 4), 1, (3, 0)),
    ):
        size = shape[axis]
        yield Case(
            "GatherElements",
            (normal(*shape), integers(-size, size, *index_shape)),
            lambda x, i, a=axis: torch.gather(x, a, i % x.shape[a]),
            {"axis": axis},
        )
    for shape, index_shape in (((4,), (3, 1)), ((3, 2), (4, 1)), ((3, 2), (2, 2, 2)), ((2, 2, 3), (3, 2))):
        width = index_shape[-1]
        sizes = np.array(shape[:width])
        indices = integers(0, 1000, *index_shape) % (2 * sizes) - sizes
        yield Case(
            "GatherND",
            (normal(*shape), indices),
            lambda x, i: x[tuple((i % torch.tensor(x.shape[: i.shape[-1]])).unbind(-1))],
        )
