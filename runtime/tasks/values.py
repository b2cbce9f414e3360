"""Reading pixels and samples: nested lists, arrays, or the path of a .npy file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepeft.errors import DataError

from ..memory.room import check_room
from ..preprocessing.arrays import mapped_array
from ..records import Record
from .examples import shown

FloatArray = npt.NDArray[np.float32]


def read_values(
    record: Record, field: str, shape: Sequence[int | None], limit: int | None = None
) -> FloatArray:
    """A field's numbers as float32.

    An array in a .npy file is mapped, not read: only the batches that need it load it.

    Args:
        record: the record.
        field: its field.
        shape: sizes of the axes; None for any.
        limit: of the first axis, so much is read at most; None for all.

    Raises:
        DataError: the field is missing, cannot be read, holds something else than finite numbers, or has
            another shape.
        BudgetError: the memory budget has no room for them.
    """
    value = record.located(field)
    if value is None:
        raise DataError(f"{record.where}: lacks the field {field!r}")
    if isinstance(value, Path):
        try:
            array = mapped_array(value)
        except DataError as error:
            raise DataError(f"{record.where}: {field}: {error}") from error
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise DataError(f"{record.where}: {field} has rows of different lengths") from error
    wanted = ["any" if size is None else size for size in shape]
    if array.dtype.kind not in "iuf":
        raise DataError(f"{record.where}: {field} is {shown(value)}, expected numbers of shape {wanted}")
    fits = array.ndim == len(shape) and all(
        size in (None, got) for size, got in zip(shape, array.shape, strict=True)
    )
    if not fits or not array.size:
        raise DataError(f"{record.where}: {field} has shape {list(array.shape)}, expected {wanted}")
    array = array[:limit]
    copied_bytes = 0 if array.dtype == np.float32 else 4 * array.size
    mapped_bytes = array.nbytes if isinstance(array, np.memmap) else 0
    check_room(
        mapped_bytes + copied_bytes + array.size, f"{record.where}: {field} of shape {list(array.shape)}"
    )
    with np.errstate(over="ignore"):  # what float32 has no room for becomes infinite
        values = array.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise DataError(f"{record.where}: {field} holds a value that is no finite number of 32 bits")
    return values
