"""The records to calibrate on, prepared as the device prepares them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import edgepeft
from edgepeft.bundle.manifest import FORMAT_VERSION, GraphSpec, Manifest, Policy, Quantization, TensorSpec
from edgepeft.bundle.memory_formula import MemoryFormula
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.writer import hash_folder
from edgepeft.errors import BundleError, UsageError
from edgepeft.runtime.records import Record
from edgepeft.runtime.records import records as as_records
from edgepeft.runtime.tasks import Task, task_for

from ..options import ExportOptions
from ..sources.model_info import model_info
from ..sources.onnx_file import is_onnx_file
from ..sources.samples import sample_inputs
from ..sources.transformers_model import Source
from .groups import Feeds

#: Longer records are cut: attention's cost grows with the square, what is learned of the inputs does not.
MAX_TOKENS = 512


def usable_records(options: ExportOptions, model: Any) -> list[Record]:
    """The records, where an export of `model` has a use for them; none where none were given.

    Raises:
        UsageError: nothing will be quantized.
        DataError: the file cannot be read, or there is no record.
    """
    if options.calibration is None:
        return []
    if is_onnx_file(model):
        raise UsageError(
            "--calibration needs a transformers model: the weights of an ONNX file are rounded to the nearest"
        )
    if options.bits in (16, 32) and options.prune is None:
        raise UsageError(
            f"--calibration goes with 4 or 8 bits: at {options.bits} bits nothing is quantized, so leave it "
            "out"
        )
    return list(as_records(options.calibration))


def read_feeds(source: Source, records: Sequence[Record], folder: Path) -> list[Feeds]:
    """The model's keyword arguments for each record alone, so that nothing is padding.

    Args:
        source: the model.
        records: as `predict` takes them.
        folder: a new one, for the tokenizer's files.

    Raises:
        DataError: a record cannot be used; the message says where it stands.
        UsageError: records are texts and the model has no tokenizer.
    """
    task = reading_task(source, folder)
    length = min(source.max_length, MAX_TOKENS * source.length_unit)
    try:
        examples = task.encode_all(records, length, training=False)
    except BundleError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise UsageError(f"--calibration: {source.name}: {reason}") from error
    return [
        {name: torch.from_numpy(array) for name, array in task.batch([example], training=False).items()}
        for example in examples
    ]


def reading_task(source: Source, folder: Path) -> Task:
    """What reads records as the device does.

    Args:
        source: the model.
        folder: a new one, for the tokenizer's files.
    """
    folder.mkdir()
    for name, data in source.tokenizer_files.items():
        (folder / name).write_bytes(data)
    return task_for(Bundle(folder, _manifest(source, folder)))


def _manifest(source: Source, folder: Path) -> Manifest:
    """As much of a bundle's manifest as preparing records takes."""
    inputs = sample_inputs(source, with_past=False).inputs
    specs = tuple(
        TensorSpec(name, str(tensor.numpy().dtype), ("batch", *tensor.shape[1:]))
        for name, tensor in inputs.items()
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        edgepeft_version=edgepeft.__version__,
        task=source.task,
        model=model_info(source),
        quantization=Quantization(32, 0),
        graphs={"inference": GraphSpec("", specs, ())},
        inference_memory=MemoryFormula(0, ()),
        weights_file="",
        weights={},
        slots=(),
        adapters=(),
        strategies=(),
        policy=Policy(()),
        verification={},
        files=hash_folder(folder),
        image_preprocessing=source.image_preprocessing,
        audio_preprocessing=source.audio_preprocessing,
    )
