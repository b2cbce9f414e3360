"""Which weights of an export are calibrated, and on what."""

from collections.abc import Sequence
from pathlib import Path

from edgepeft.bundle.manifest import Calibration
from edgepeft.runtime.records import Record

from ..options import ExportOptions
from ..quantize.freeze import Freezer
from ..sources.base import ModelSource
from ..sources.transformers_model import Source
from .calibrate import Progress, Sizes, calibrate
from .groups import Feeds
from .own_text import own_text
from .records import read_feeds


def is_calibrated(source: ModelSource, records: Sequence[Record], options: ExportOptions, bits: int) -> bool:
    """Whether weights are rounded for what they read: of records, or at 4 bits of what the model writes
    itself, unless it writes nothing or it is to be quick."""
    if options.quick or bits not in (4, 8):
        return False
    writes = source.task == "text-generation" and isinstance(source, Source)
    return bool(records) or (bits == 4 and writes)


def representative(
    source: ModelSource, records: Sequence[Record], options: ExportOptions, folder: Path
) -> list[Feeds]:
    """The model's keyword arguments for what its layers are measured on: the records, or else what it writes
    itself.

    Args:
        source: a transformers model.
        records: of the caller's.
        options: those of the export.
        folder: a new one, for the tokenizer's files.

    Raises:
        DataError: a record cannot be used; the message says where it stands.
        UsageError: records are texts and the model has no tokenizer.
    """
    assert isinstance(source, Source)
    return read_feeds(source, records, folder) if records else own_text(source, options.seed)


def looked_at(feeds: Sequence[Feeds], options: ExportOptions) -> tuple[int, str]:
    """How many texts or records `representative` has made feeds of, and which: `Calibration.inputs`."""
    count = sum(len(next(iter(each.values()))) for each in feeds)
    return count, "own text" if options.calibration is None else "records"


def calibrated(
    source: ModelSource,
    feeds: Sequence[Feeds],
    options: ExportOptions,
    freezer: Freezer,
    saved: Sequence[str],
    progress: Progress,
) -> Calibration | None:
    """Round the source's weights into `freezer`; see `calibrate`.

    Args:
        source: a transformers model.
        feeds: what it is calibrated on, see `representative`.
        options: those of the export.
        freezer: knows the bits and the block size.
        saved: modules that are not quantized.
        progress: is told how many weights of how many are done.

    Returns:
        What the manifest says of it; `rounded` is known when the weights have been written. None where no
        weight can be quantized.

    Raises:
        UsageError: the bytes that the weights may take are too few.
    """
    assert isinstance(source, Source)
    found = calibrate(
        source.model,
        feeds,
        Sizes(freezer.bits, freezer.block_size, options.size_bytes),
        kept=saved,
        seed=options.seed,
        progress=progress,
    )
    if not found.weights:
        return None
    freezer.quantized.update(found.weights)
    count, inputs = looked_at(feeds, options)
    return Calibration("gptq", count, (), inputs, found.errors)
