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
from .own_text import own_text
from .records import read_feeds


def is_calibrated(source: ModelSource, records: Sequence[Record], options: ExportOptions, bits: int) -> bool:
    """Whether weights are rounded for what they read: of records, or at 4 bits of what the model writes
    itself, unless it writes nothing or it is to be quick."""
    if records:
        return True
    writes = source.task == "text-generation" and isinstance(source, Source)
    return bits == 4 and writes and not options.quick


def calibrated(
    source: ModelSource,
    records: Sequence[Record],
    options: ExportOptions,
    folder: Path,
    freezer: Freezer,
    saved: Sequence[str],
    progress: Progress,
) -> Calibration | None:
    """Round the source's weights into `freezer`; see `calibrate`.

    Args:
        source: a transformers model.
        records: of the caller's; none: what the model writes itself.
        options: those of the export.
        folder: a new one, for the tokenizer's files.
        freezer: knows the bits and the block size.
        saved: modules that are not quantized.
        progress: is told how many weights of how many are done.

    Returns:
        What the manifest says of it; `rounded` is known when the weights have been written. None where no
        weight can be quantized.

    Raises:
        DataError: a record cannot be used; the message says where it stands.
        UsageError: records are texts and the model has no tokenizer.
    """
    assert isinstance(source, Source)
    feeds = read_feeds(source, records, folder) if records else own_text(source, options.seed)
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
    count = sum(len(next(iter(each.values()))) for each in feeds)
    return Calibration("gptq", count, (), "records" if records else "own text", found.errors)
