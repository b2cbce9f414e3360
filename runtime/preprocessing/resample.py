"""Resizing images as Pillow does: a separable filter, widened where the image shrinks, in fixed point.

Two passes, the horizontal one first, each rounded to 8 bits, with coefficients of 22 bits: equal to
`PIL.Image.resize` bit for bit on uint8 images, but for some tall ones, which Pillow shrinks vertically first
since version 13, so that values may differ by a level of 256. The order of older versions is kept here.

Source: Pillow, `src/libImaging/Resample.c` and, for `nearest`, `Geometry.c`.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]

PRECISION_BITS = 22


def _bilinear(x: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(1 - np.abs(x), 0), np.float64)


def _bicubic(x: FloatArray) -> FloatArray:
    """Keys' cubic convolution with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: FloatArray) -> FloatArray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


FILTERS: dict[str, tuple[Callable[[FloatArray], FloatArray], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""By name: the filter and how far it reaches."""
NEAREST = "nearest"


def resize(image: Pixels, height: int, width: int, resample: str) -> Pixels:
    """The image in another size.

    Args:
        image: uint8 `[height, width, channels]`.
        height: of the result.
        width: of the result.
        resample: `nearest`, or a name of `FILTERS`.
    """
    if resample == NEAREST:
        rows, columns = (
            # Added up rather than multiplied: where a pixel's middle falls on an edge, the error decides.
            np.cumsum([0.5 * old / size, *[old / size] * (size - 1)]).astype(np.intp)
            for old, size in zip(image.shape, (height, width), strict=False)
        )
        return image[rows[:, None], columns]
    if width != image.shape[1]:
        image = np.moveaxis(_pass(np.moveaxis(image, 1, 0), width, resample), 0, 1)
    if height != image.shape[0]:
        image = _pass(image, height, resample)
    return np.ascontiguousarray(image)


def _pass(image: Pixels, size: int, resample: str) -> Pixels:
    """The first axis resized."""
    first, weights = _coefficients(image.shape[0], size, resample)
    total = np.full((size, *image.shape[1:]), 1 << (PRECISION_BITS - 1), np.int32)
    last = image.shape[0] - 1
    axes = (slice(None), *(None for _ in image.shape[1:]))
    for tap in range(weights.shape[1]):
        # Behind the last pixel the weights are 0.
        total += weights[:, tap][axes] * image[np.minimum(first + tap, last)]
    return np.asarray(np.clip(total >> PRECISION_BITS, 0, 255), np.uint8)


def _coefficients(old: int, size: int, resample: str) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]]:
    """For each output pixel its first input pixel, and the weights of that and the following ones."""
    function, reach = FILTERS[resample]
    scale = old / size
    spread = max(scale, 1.0)
    support = reach * spread
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.intp), 0)
    count = np.minimum((center + support + 0.5).astype(np.intp), old) - first
    taps = np.arange(min(math.ceil(support) * 2 + 1, int(count.max())))
    weights = function((taps + first[:, None] - center[:, None] + 0.5) / spread)
    weights = np.where(taps < count[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    # Rounded half away from zero.
    scaled = weights * (1 << PRECISION_BITS)
    return first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
