"""Reading elements by index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..harness import Case
from .arrays import distinct, integers, normal


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
    for batch_dims, shape, index_shape in (
        (1, (2, 3), (2, 1)),
        (1, (2, 3, 2), (2, 2, 1)),
        (2, (2, 2, 3), (2, 2, 1)),
    ):
        index = integers(0, shape[batch_dims], *index_shape)

        def batched(x: torch.Tensor, i: torch.Tensor, b: int = batch_dims) -> torch.Tensor:
            rows = x.reshape(-1, *x.shape[b:])
            places = i.reshape(rows.shape[0], *i.shape[b:])
            picked = torch.stack([row[place.unbind(-1)] for row, place in zip(rows, places, strict=True)])
            return picked.reshape(*i.shape[:-1], *x.shape[b + 1 :])

        yield Case("GatherND", (normal(*shape), index), batched, {"batch_dims": batch_dims})
    yield from _scatters()
    for shape, index_shape in (((4,), (3, 1)), ((3, 2), (4, 1)), ((3, 2), (2, 2, 2)), ((2, 2, 3), (3, 2))):
        width = index_shape[-1]
        sizes = np.array(shape[:width])
        indices = integers(0, 1000, *index_shape) % (2 * sizes) - sizes
        yield Case(
            "GatherND",
            (normal(*shape), indices),
            lambda x, i: x[tuple((i % torch.tensor(x.shape[: i.shape[-1]])).unbind(-1))],
        )


def _scatters() -> Iterator[Case]:
    for reduction in ("none", "add"):
        attributes = {"reduction": reduction}
        for shape, axis, index in (
            ((4,), 0, [1, 3]),
            ((3, 4), 1, [[0, -1], [2, 1], [3, 0]]),
            ((3, 2), 0, [[2, 0]]),
        ):

            def elements(
                x: torch.Tensor, i: torch.Tensor, u: torch.Tensor, a: int = axis, r: str = reduction
            ) -> torch.Tensor:
                i = i % x.shape[a]
                return x.scatter_add(a, i, u) if r == "add" else x.scatter(a, i, u)

            places = np.array(index)
            yield Case(
                "ScatterElements",
                (normal(*shape), places, normal(*places.shape, seed=1)),
                elements,
                {"axis": axis, **attributes},
            )
        for shape, index in (((4,), [[1], [3]]), ((3, 2), [[2], [0]]), ((2, 3), [[1, 0], [0, -1]])):
            places = np.array(index)

            def slices(x: torch.Tensor, i: torch.Tensor, u: torch.Tensor, r: str = reduction) -> torch.Tensor:
                return x.index_put(i.unbind(-1), u, accumulate=r == "add")

            updates = normal(places.shape[0], *shape[places.shape[1] :], seed=1)
            yield Case("ScatterND", (normal(*shape), places, updates), slices, attributes)
    repeated = np.array([0, 2, 0])
    yield Case(
        "ScatterElements",
        (normal(4), repeated, normal(3, seed=1)),
        lambda x, i, u: x.scatter_add(0, i, u),
        {"reduction": "add"},
        label="repeated",
    )
    for largest in (0, 1):
        for shape, axis, k in (((5,), 0, 2), ((2, 4), 1, 3), ((3, 2), 0, 1)):
            yield Case(
                "TopK",
                (distinct(*shape), np.array([k])),
                lambda x, _, a=axis, k=k, g=largest: torch.topk(x, k, a, largest=bool(g)),
                {"axis": axis, "largest": largest},
                outputs=2,
                constants=(1,),
            )
