"""Images to pixels as a model takes them: resized, cropped, rescaled, normalized."""

import contextlib
import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import ImagePreprocessing
from edgepeft.errors import BudgetError, DataError, MissingExtraError

from ..memory.room import check_room, no_room
from .arrays import mapped_array
from .resample import Pixels, resize

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("PNG", "PPM", "JPEG")
_ROWS = 64
_PIXELS_PER_BYTE = {"PNG": 8 * 1032, "PPM": 8, "JPEG": 8 * 64}
"""What a byte of a file holds at most: deflate's best of black and white; bits; a bit a block of 8 x 8."""
LEFT_BYTES = 3 * 2**20
"""What decoding pictures leaves in the process, beside the decoders: 1.3 to 4.6 MiB, measured."""
MAX_PIXELS = 2**26
"""Largest image that is opened: 67 million pixels."""


def read_image(value: object, channels: int, edge: int | None = None) -> Pixels:
    """An image as uint8 `[height, width, channels]`, upright: a file's EXIF orientation is followed.

    A JPEG file that the memory budget has no room for is decoded at a half, a quarter or an eighth of its
    size.

    Args:
        value: an array of numbers from 0 to 255, or a path: of a .npy file with such an array, or of a PNG,
            PPM or JPEG file, which Pillow reads.
        channels: 3 for colors, 1 for grey.
        edge: pixels of its shorter side that are of use, so that a JPEG file may be decoded to twice that;
            None if all of them are.

    Raises:
        BudgetError: the memory budget has no room for it.
        DataError: it cannot be read, or is no image.
        MissingExtraError: Pillow is not installed.
    """
    if isinstance(value, str | Path):
        path = Path(value)
        array = mapped_array(path) if path.suffix == ".npy" else _decoded(path, channels, edge)
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise DataError("has rows of different lengths") from error
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise DataError(f"has shape {list(array.shape)}, expected [height, width, {channels}]")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise DataError(f"has {array.shape[0] * array.shape[1]:,} pixels, at most {MAX_PIXELS:,} are read")
    if isinstance(array, np.memmap) or array.dtype != np.uint8:
        copied_bytes = 0 if array.dtype == np.uint8 else array.size
        check_room(array.nbytes + copied_bytes, f"an image of {array.shape[0]} x {array.shape[1]} pixels")
    whole = array.dtype.kind in "iu"
    if not whole or (array.dtype != np.uint8 and (int(array.min()) < 0 or int(array.max()) > 255)):
        raise DataError(f"is of dtype {array.dtype}, expected uint8: whole numbers from 0 to 255")
    return np.asarray(array, np.uint8)


def load_decoders() -> None:
    """Import what reading a picture's file imports, if it is installed: it stays in the process."""
    with contextlib.suppress(ImportError):
        for name in FORMATS:
            importlib.import_module(f"PIL.{name.title()}ImagePlugin")


def preprocess(image: Pixels, settings: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """Pixels float32 `[channels, height, width]` of an image uint8 `[height, width, channels]`, those of
    transformers' image processor with Pillow."""
    height, width = image.shape[:2]
    if settings.shortest_edge is not None:
        edge = settings.shortest_edge
        longer = int(edge * max(height, width) / min(height, width))
        if longer > 64 * edge:
            raise DataError(f"is {height} x {width} pixels: too narrow for a shortest edge of {edge}")
        height, width = (longer, edge) if width <= height else (edge, longer)
        image = resize(image, height, width, settings.resample)
    elif settings.height is not None and settings.width is not None:
        image = resize(image, settings.height, settings.width, settings.resample)
    if settings.crop_height is not None and settings.crop_width is not None:
        image = _center_crop(image, settings.crop_height, settings.crop_width)
    pixels = (image * settings.rescale_factor).astype(np.float32)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return np.ascontiguousarray(np.moveaxis((pixels - mean) / std, 2, 0))


def _center_crop(image: Pixels, height: int, width: int) -> Pixels:
    """The middle of an image; of a smaller one with zeros around it."""
    padding = [max(size - old, 0) for size, old in zip((height, width), image.shape, strict=False)]
    if any(padding):
        before = [math.ceil(size / 2) for size in padding]
        around = [(first, size - first) for first, size in zip(before, padding, strict=True)]
        image = np.pad(image, [*around, (0, 0)])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _no_room(path: Path, image: "PIL.Image.Image", channels: int, beside_bytes: int) -> BudgetError | None:
    """The error, where the budget has no room for an image: Pillow takes four bytes a pixel."""
    wanted_bytes = (4 + channels) * image.width * image.height + beside_bytes
    return no_room(wanted_bytes, f"{path}, an image of {image.height} x {image.width} pixels,")


def _decoded(path: Path, channels: int, edge: int | None) -> Pixels:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "image", "reading an image file (instead of .npy)") from error
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width * image.height:,} pixels, at most {MAX_PIXELS:,} are read"
                )
            most = _PIXELS_PER_BYTE[str(image.format)] * path.stat().st_size
            if image.width * image.height > most:
                raise DataError(
                    f"{path} says that it has {image.width * image.height:,} pixels, and its bytes hold at "
                    f"most {most:,}: it is damaged"
                )
            mode = "RGB" if channels == 3 else "L"
            # Of a progressive JPEG all coefficients are held, two bytes each, whatever size it is decoded at.
            beside_bytes = 6 * image.width * image.height if image.info.get("progressive") else 0
            refusal = _no_room(path, image, channels, beside_bytes)
            if refusal is not None and image.format == "JPEG" and edge is not None:
                image.draft(mode, (2 * edge, 2 * edge))
                refusal = _no_room(path, image, channels, beside_bytes)
            if refusal is not None:
                raise refusal
            pixels = np.empty((image.height, image.width, channels), np.uint8)
            for top in range(0, image.height, _ROWS):  # so that it is not there three times
                rows = image.crop((0, top, image.width, min(top + _ROWS, image.height))).convert(mode)
                pixels[top : top + _ROWS] = np.asarray(rows).reshape(-1, image.width, channels)
            return _upright(pixels, _orientation(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no PNG, PPM or JPEG image that can be read ({error})") from error


def _orientation(image: "PIL.Image.Image") -> int:
    """How a camera was held, 1 to 8 (EXIF, tag 0x112); 1 where nothing says so."""
    try:
        return int(image.getexif().get(0x112, 1))
    except Exception:  # whatever Pillow raises of damaged tags, which are no part of the picture
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """A view of pixels `[height, width, channels]`, turned and mirrored as their orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
