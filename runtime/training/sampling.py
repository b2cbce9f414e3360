"""Which records are held out and which make up each batch: a function of the seed alone."""

import numpy as np
import numpy.typing as npt

from edgepeft.errors import DataError

Indices = npt.NDArray[np.int64]

# Keeps the split's random stream apart from those of the epochs, which are numbered from 0.
_SPLIT = 2**32 - 1


def split(
    count: int, fraction: float, seed: int, minimum: int = 1, classes: Indices | None = None
) -> tuple[Indices, Indices]:
    """Indices of the records to train on, and of those held out to judge the update.

    Args:
        count: number of records.
        fraction: share to hold out.
        seed: of `numpy.random.default_rng`.
        minimum: records that each side needs at least.
        classes: int64 `[count]`, the class of each record: each side gets its share of every class, as far as
            whole records allow.

    Raises:
        DataError: there are too few records for both.
    """
    held_out = max(minimum, round(count * fraction))
    if count - held_out < minimum:
        raise DataError(
            f"the data has {count} usable records, at least {held_out + minimum} are needed: {held_out} are "
            f"held out to judge the update and {minimum} must remain to train on"
        )
    order = np.random.default_rng([seed, _SPLIT]).permutation(count)
    if classes is not None:
        order = _spread(order, classes)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _spread(order: Indices, classes: Indices) -> Indices:
    """The same records, so that every beginning has about its share of each class."""
    place = np.empty(len(order))
    for kind in sorted(set(classes.tolist())):  # numpy.unique brings a megabyte of modules
        of = np.flatnonzero(classes[order] == kind)
        place[of] = (np.arange(len(of)) + 0.5) / len(of)
    return order[np.argsort(place, kind="stable")]


def steps_per_epoch(count: int, batch_size: int, minimum: int = 1) -> int:
    """Batches an epoch has; a last batch of fewer than `minimum` records is left out."""
    full, rest = divmod(count, batch_size)
    return full + (rest >= minimum)


def batch_indices(
    count: int, batch_size: int, seed: int, step: int, minimum: int = 1, classes: Indices | None = None
) -> Indices:
    """The records of a step (from 0): each epoch is one `default_rng([seed, epoch]).permutation(count)`, cut
    in order; where records have `classes`, int64 `[count]`, with its share of each in every batch."""
    epoch, position = divmod(step, steps_per_epoch(count, batch_size, minimum))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    if classes is not None:
        order = _spread(order, classes)
    return order[position * batch_size : (position + 1) * batch_size]
