"""What an adapter keeps of the records that its head learned from: their features, by label.

Where later records have other labels only, a head that is fitted to both knows all of them. Texts, images and
recordings are not kept, and PEFT does not look at the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepeft.errors import AdapterError
from edgepeft.tensor_files import read_tensors, write_tensors

from ...memory.room import check_room

FloatArray = npt.NDArray[np.float32]

FILE = "head_features.safetensors"
"""In the adapter's folder: a float16 tensor `[records, width]` for each label, by its name."""
MOST_BYTES = 2**20
"""Of features in the file; of more records it has a sample in which every label has as many as it can."""


def most_records(width: int) -> int:
    """How many records of so many features are kept."""
    return max(MOST_BYTES // (2 * width), 1)


def read_features(folder: Path, labels: Sequence[str], width: int) -> dict[str, FloatArray]:
    """What the adapter in a folder keeps of records with these labels: float32 `[records, width]` by label.

    Raises:
        AdapterError: the file is damaged, or of another model.
        BudgetError: the memory budget has no room for it.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    check_room(4 * file.stat().st_size, str(file))
    found = {name: values for name, values in read_tensors(file).items() if name in labels}
    for name, values in found.items():
        if values.ndim != 2 or values.shape[1] != width or not np.isfinite(values).all():
            raise AdapterError(
                f"{file}: label {name!r} has {list(values.shape)}, expected finite features "
                f"[records, {width}]: the file is damaged or of another model: remove it, and give records "
                "of every label"
            )
    return found


def write_features(folder: Path, features: Mapping[str, FloatArray]) -> None:
    """Keep features `[records, width]` by label in an adapter's folder, unless float16 cannot hold them."""
    with np.errstate(over="ignore"):
        halves = {name: values.astype(np.float16) for name, values in features.items() if len(values)}
    if halves and all(np.isfinite(values).all() for values in halves.values()):
        write_tensors(folder / FILE, halves)


def balanced_sample(labels: npt.NDArray[np.int64], most: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices, in their order, of at most `most` records, every label having as many as it can."""
    turns = np.empty(len(labels), np.int64)
    generator = np.random.default_rng(seed)
    for label in sorted(set(labels.tolist())):  # numpy.unique brings a megabyte of modules
        of = np.flatnonzero(labels == label)
        turns[of] = generator.permutation(len(of))
    return np.sort(np.argsort(turns, kind="stable")[:most])
