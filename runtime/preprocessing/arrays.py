"""Arrays in .npy files, mapped."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepeft.errors import DataError


def mapped_array(path: Path) -> npt.NDArray[np.generic]:
    """The array in a .npy file; only what is looked at is read.

    Raises:
        DataError: there is none, or one of Python objects.
    """
    try:
        array: npt.NDArray[np.generic] = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy has Python parse the header, and lets through what comes of it
        raise DataError(f"{path} is no .npy file of numbers ({error})") from error
    return array
