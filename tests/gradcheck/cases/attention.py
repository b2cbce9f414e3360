"""Attention and rotary embeddings of the standard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..harness import Array, Case
from .arrays import normal


def _attention(
    *,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> Callable[..., torch.Tensor]:
    def split(x: torch.Tensor, n: int) -> torch.Tensor:
        return x if x.ndim == 4 else x.reshape(*x.shape[:2], n, -1).transpose(1, 2)

    def function(q: Any, k: Any, v: Any, mask: Any = None) -> torch.Tensor:
        packed = q.ndim == 3
        q, k, v = split(q, heads), split(k, kv_heads), split(v, kv_heads)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        if mask is not None and mask.dtype == torch.bool:
            allowed = allowed & mask
        elif mask is not None:
            allowed = allowed & (mask > -1e30)
            scores = scores + mask.clamp(min=-1e30)
        if causal:
            allowed = allowed.tril()
        # A row without a key is 0, not the mean of the values.
        alive = allowed.any(-1, keepdim=True)
        p = torch.softmax(scores.masked_fill(~allowed & alive, -math.inf), -1)
        y = torch.where(alive, p, 0) @ v
        return y.transpose(1, 2).flatten(2) if packed else y

    return function


def _rotary(
    x: Any, cos: Any, sin: Any, positions: Any = None, *, heads: int, dim: int, interleaved: int
) -> Any:
    packed = x.ndim == 3
    y = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) if packed else x
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None], sin[:, None]
    width = dim or y.shape[-1]
    turn, keep = y[..., :width], y[..., width:]
    a, b = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    turned = (
        torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    )
    y = torch.cat([turned, keep], -1)
    return y.transpose(1, 2).flatten(2) if packed else y


def cases() -> Iterator[Case]:
    batch, rows, columns, size = 2, 3, 4, 2
    boolean = np.random.default_rng(0).random((batch, 1, rows, columns)) > 0.3
    boolean[..., 0] = True
    every_key_masked = boolean.copy()
    every_key_masked[0, 0, 1] = False
    masks: dict[str, Array | None] = {
        "plain": None,
        "bool": boolean,
        "additive": normal(rows, columns, seed=9),
        "rank3": normal(4, rows, columns, seed=9),
        "every-key-masked": every_key_masked,
        "minus-infinity": np.where(every_key_masked, 0.0, -np.inf),
        "per-head": normal(batch, 4, rows, columns, seed=9),
    }
    for kv_heads in (4, 2, 1):
        for name, mask in masks.items():
            for causal in (0, 1):
                common: dict[str, Any] = {"is_causal": causal} if causal else {}
                inputs = (
                    normal(batch, 4, rows, size),
                    normal(batch, kv_heads, columns, size, seed=1),
                    normal(batch, kv_heads, columns, 3, seed=2),
                )
                yield Case(
                    "Attention",
                    inputs if mask is None else (*inputs, mask),
                    _attention(heads=4, kv_heads=kv_heads, causal=bool(causal)),
                    common,
                    wrt=(0, 1, 2),
                    label=name,
                    tolerance64=2e-7,
                    symbolic_axes=(0, 2),
                    # Mask axes count from the end, so a mask of lower rank keeps its shape.
                    static_inputs=(3,) if mask is not None and mask.ndim == 3 else (),
                    # In float64 neither evaluator knows rows without a key.
                    float64=name not in ("every-key-masked", "minus-infinity"),
                    linear=False,
                )
    for kv_heads in (2, 1):
        packed = (
            normal(batch, rows, 2 * size),
            normal(batch, columns, kv_heads * size, seed=1),
            normal(batch, columns, kv_heads * size, seed=2),
        )
        attributes: dict[str, Any] = {"q_num_heads": 2, "kv_num_heads": kv_heads}
        f = _attention(heads=2, kv_heads=kv_heads)
        yield Case("Attention", packed, f, attributes, label="packed", tolerance64=2e-7, symbolic_axes=(0, 1))
        f = _attention(heads=2, kv_heads=kv_heads, scale=0.3, softcap=1.5)
        attributes = {**attributes, "scale": 0.3, "softcap": 1.5}
        yield Case("Attention", packed, f, attributes, label="packed", tolerance64=2e-7, symbolic_axes=(0, 1))
        yield Case(
            "Attention",
            packed,
            f,
            attributes,
            label="packed24",
            tolerance64=2e-7,
            symbolic_axes=(0, 1),
            opset=24,
        )

    angles = normal(6, 2)
    for interleaved in (0, 1):
        for dim in (0, 2):
            width = (dim or 4) // 2
            cos, sin = np.cos(angles[:, :width]), np.sin(angles[:, :width])
            attributes = {"interleaved": interleaved, "rotary_embedding_dim": dim, "num_heads": 2}
            positions = np.array([[0, 2, 5], [1, 1, 3]])

            def function(*xs: Any, d: int = dim, i: int = interleaved) -> Any:
                return _rotary(*xs, heads=2, dim=d, interleaved=i)

            cached = (cos, sin, positions)
            looked_up = (cos[positions], sin[positions])
            yield Case("RotaryEmbedding", (normal(2, 2, 3, 4), *cached), function, attributes, wrt=(0,))
            yield Case("RotaryEmbedding", (normal(2, 3, 8), *cached), function, attributes, wrt=(0,))
            if not dim:
                yield Case(
                    "RotaryEmbedding", (normal(2, 2, 3, 4), *looked_up), function, attributes, wrt=(0,)
                )
