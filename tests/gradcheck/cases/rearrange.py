"""Operators that pad, repeat, mirror, accumulate or resample along axes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..harness import Case
from .arrays import int64, normal

F = torch.nn.functional


def cases() -> Iterator[Case]:
    for shape, pads, torch_pads in (
        ((3,), (1, 2), (1, 2)),
        ((2, 3), (0, 1, 2, 0), (1, 0, 0, 2)),
        ((2, 3), (0, -1, 0, 1), (-1, 1, 0, 0)),
        ((2, 0), (0, 1, 0, 0), (1, 0, 0, 0)),
    ):
        for constants in ((1,), ()):
            yield Case(
                "Pad",
                (normal(*shape), int64(*pads)),
                lambda x, _, p=torch_pads: F.pad(x, p),
                constants=constants,
                label=("constant" if constants else "at-run-time") + str(pads),
            )
    yield Case(
        "Pad",
        (normal(2, 3), int64(1, 1), np.array(0.5), int64(-1)),
        lambda x, *_: F.pad(x, (1, 1), value=0.5),
        wrt=(0,),
        constants=(1, 3),
    )
    for mode, torch_mode in (("reflect", "reflect"), ("edge", "replicate"), ("wrap", "circular")):
        yield Case(
            "Pad",
            (normal(1, 2, 4), int64(0, 0, 2, 0, 0, 1)),
            lambda x, _, m=torch_mode: F.pad(x, (2, 1), mode=m),
            {"mode": mode},
            constants=(1,),
        )
    for shape, repeats in (((3,), (2,)), ((2, 3), (1, 2)), ((1, 2, 1), (2, 1, 3)), ((2, 2), (0, 1))):
        for constants in ((1,), ()):
            yield Case(
                "Tile",
                (normal(*shape), int64(*repeats)),
                lambda x, _, r=repeats: x.repeat(r),
                constants=constants,
                label="constant" if constants else "at-run-time",
            )
    for shape, axis in (((4,), 0), ((2, 3), 1), ((2, 3, 2), -2)):
        for exclusive in (0, 1):
            for reverse in (0, 1):

                def function(
                    x: torch.Tensor, _: object, a: int = axis, e: int = exclusive, r: int = reverse
                ) -> torch.Tensor:
                    y = x.flip(a) if r else x
                    total = y.cumsum(a) - (y if e else 0)
                    return total.flip(a) if r else total

                yield Case(
                    "CumSum",
                    (normal(*shape), np.array(axis)),
                    function,
                    {"exclusive": exclusive, "reverse": reverse},
                )
    for upper in (0, 1):
        for k in (None, -1, 1):
            yield Case(
                "Trilu",
                (normal(2, 3, 4), None if k is None else np.array(k)),
                lambda x, d, u=upper: (torch.triu if u else torch.tril)(x, 0 if d is None else int(d)),
                {"upper": upper},
                label=f"k{k}",
            )
    yield Case(
        "ReverseSequence",
        (normal(3, 2, 2), int64(2, 3)),
        lambda x, _: torch.stack([torch.cat([x[:2, 0].flip(0), x[2:, 0]]), x[:, 1].flip(0)], 1),
        {"batch_axis": 1, "time_axis": 0},
    )
    yield Case("SpaceToDepth", (normal(1, 2, 4, 2),), _space_to_depth, {"blocksize": 2})
    yield Case("DepthToSpace", (normal(1, 8, 2, 1),), _depth_to_space, {"blocksize": 2})
    yield Case(
        "DepthToSpace",
        (normal(2, 8, 2, 1),),
        lambda x: F.pixel_shuffle(x, 2),
        {"blocksize": 2, "mode": "CRD"},
    )
    yield from _resizes()


def _space_to_depth(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def _depth_to_space(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


def _resizes() -> Iterator[Case]:
    for label, function, attributes in (
        (
            "nearest",
            lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        ),
        ("linear", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), {"mode": "linear"}),
        (
            "corners",
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        ),
        (
            "cubic",
            lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
            {"mode": "cubic", "cubic_coeff_a": -0.75},
        ),
    ):
        x = normal(1, 2, 3, 2)
        scales = np.array([1, 1, 2, 2], np.float32)
        common = {"attributes": attributes, "wrt": (0,), "float64": False}
        yield Case(
            "Resize", (x, None, scales), lambda x, *_, f=function: f(x), constants=(2,), label=label, **common
        )
        sizes = int64(1, 2, 6, 4)
        yield Case(
            "Resize",
            (x, None, None, sizes),
            lambda x, *_, f=function: f(x),
            constants=(3,),
            label=f"{label}-sizes",
            **common,
        )
    yield Case(
        "Resize",
        (normal(1, 2, 3, 4), None, None, int64(2, 6)),
        lambda x, *_: F.interpolate(x, size=(2, 6), mode="bilinear"),
        {"mode": "linear", "axes": [2, 3]},
        wrt=(0,),
        constants=(3,),
        float64=False,
        label="axes",
    )
