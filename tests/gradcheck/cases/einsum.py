"""Einsum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..harness import Case
from .arrays import normal

EQUATIONS: list[tuple[str, str, tuple[tuple[int, ...], ...]]] = [
    ("ij,jk->ik", "", ((2, 3), (3, 2))),
    ("ij,jk", "ij,jk->ik", ((2, 3), (3, 2))),
    ("bij,bjk->bik", "", ((2, 2, 3), (2, 3, 2))),
    ("bsi,ir->bsr", "", ((2, 2, 3), (3, 2))),
    ("bhqd,bhkd->bhqk", "", ((1, 2, 2, 3), (1, 2, 3, 3))),
    ("...ij,...jk->...ik", "", ((2, 2, 3), (2, 3, 2))),
    ("...ij,jk->...ik", "", ((2, 1, 2, 3), (3, 2))),
    ("i,j->ij", "", ((2,), (3,))),
    ("i,i->", "", ((3,), (3,))),
    ("ij->ji", "", ((2, 3),)),
    ("ij->i", "", ((2, 3),)),
    ("ij->", "", ((2, 3),)),
    ("ij,k->i", "", ((2, 3), (2,))),
    ("ij,jk,kl->il", "", ((2, 2), (2, 3), (3, 2))),
    ("ij,jk->ik", "", ((2, 0), (0, 2))),
    ("abcde,abcde->ace", "", ((1, 2, 1, 2, 2), (1, 2, 1, 2, 2))),
]


def cases() -> Iterator[Case]:
    for equation, explicit, shapes in EQUATIONS:
        yield Case(
            "Einsum",
            tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes)),
            lambda *xs, q=explicit or equation: torch.einsum(q, *xs),
            {"equation": equation},
        )
