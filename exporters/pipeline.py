"""`edgepeft.export`: from a model and its adapters to a verified bundle."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgepeft.adapters import Adapter, check_base, fit, load_adapter
from edgepeft.bundle.manifest import Calibration, Manifest
from edgepeft.bundle.writer import MANIFEST_FILE, write_manifest
from edgepeft.errors import AdapterError, UsageError
from edgepeft.files import atomic_folder, check_replaceable, temporary_folder

from .base_fingerprint import base_fingerprint
from .calibration_records import read_feeds, usable_records
from .contents import Losses, write_contents
from .forward import build_forward
from .measure.bundle import with_memory
from .quantize.blockwise import BLOCK_SIZES
from .quantize.calibrate import Progress, calibrate
from .quantize.freeze import Freezer
from .sources.base import ModelSource
from .sources.loading import load_source
from .sources.model_info import saved_module_names
from .sources.onnx_file import OnnxFile, converting, is_onnx_file, load_onnx_file
from .sources.peft_patterns import check_patterns
from .sources.transformers_model import Source
from .techniques.fresh import LoraOptions, write_file_adapter, write_starting_adapter
from .techniques.stored_modules import prepare_stored, without_unused
from .verify.file import verify_against_file
from .verify.pytorch import verify_bundle
from .verify.text import verify_text
from .versions import outside_range

#: Name of the adapter that `rank` or `targets` create.
STARTING_ADAPTER = "default"
Report = Callable[[str], None]


def export(
    model: Any,
    output: str | Path,
    *,
    task: str | None = None,
    bits: int | None = None,
    block_size: int = 32,
    adapters: Mapping[str, str | Path] | None = None,
    labels: Sequence[str] | None = None,
    rank: int | None = None,
    targets: Sequence[str] | None = None,
    lora_alpha: int | None = None,
    loss: str | None = None,
    drift_penalty: bool = False,
    calibration: str | Path | Iterable[Mapping[str, Any]] | None = None,
    train: bool = True,
    verify: bool = True,
    seed: int = 0,
    force: bool = False,
    report: Report = lambda _: None,
    progress: Progress = lambda _done, _total: None,
) -> Manifest:
    """Export `model` and `adapters` as one bundle and check it against PyTorch, or against the ONNX file.

    Args:
        model: a transformers model object, a folder, a hub id, the path of a GGUF file (`….gguf`), whose
            weights are decoded and rounded anew, or that of an ONNX file (`….onnx`) that somebody else
            exported. A PEFT model or an adapter's folder is exported merged into its base.
        output: the bundle's folder; a bundle that is there is replaced, anything else refused.
        task: one of `edgepeft.bundle.validation.TASKS`; inferred from the model where None.
        bits: 4 or 8 (blockwise), 16 (float16) or 32 (float32) for the frozen matrices and the embedding; 4
            where None. An ONNX file that is quantized already keeps its weights as they are.
        block_size: weights that share a scale, at 4 and 8 bits.
        adapters: PEFT LoRA folders by the name they get in the bundle.
        labels: classes of a new classification head.
        rank: makes a fresh adapter named `default` of this rank.
        targets: suffixes of the linears that get LoRA slots, besides those of `adapters`; None: those of
            `adapters`, or every linear but the output head where there are none. Of an ONNX file also names
            of nodes and of initializers.
        lora_alpha: of the fresh adapter; twice the rank where None.
        loss: a loss other than the task's own: `triplet`, for feature-extraction.
        drift_penalty: let the loss also count how far the logits drift from the base model's.
        calibration: records (a JSONL file by path, or mappings) that are like what the model will read, a few
            hundred: at 4 and 8 bits the linears are quantized so that what they compute of these comes
            nearest (GPTQ), which takes minutes, and an embedding that is not the output layer too has 8.
            None: each weight is rounded to the nearest.
        train: also write the training graphs.
        verify: compare logits, losses, gradients and what is generated with PyTorch (of an ONNX file:
            outputs with the file's, gradients with finite differences), and refuse a bundle that differs.
            Tokens, chat templates and labels, which take no time, are compared in any case.
        seed: draws a new head and a fresh adapter.
        force: take adapters that say they were trained on another base.
        report: is told the name of each stage.
        progress: is told how many weights of how many are calibrated.

    Returns:
        The bundle's manifest.

    Raises:
        UsageError: an argument cannot be used.
        ExportError: the model cannot be exported.
        DataError: a calibration record cannot be used, or there is none.
        AdapterError: an adapter does not fit the model, was trained on another or has no effect.
        VerificationError: the bundle disagrees with PyTorch or with the file; nothing is written.
    """
    _check_arguments(bits, block_size, rank, adapters)
    if untried := outside_range():
        report(f"not run with {', '.join(untried)}: trying")
    records = None if calibration is None else usable_records(calibration, model, bits)
    output = Path(output)
    check_replaceable(output, MANIFEST_FILE)
    with ExitStack() as stack:
        scratch = stack.enter_context(temporary_folder())
        folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
        loaded = {name: load_adapter(folder) for name, folder in folders.items()}
        report("loading the model")
        source: Source | OnnxFile
        if is_onnx_file(model):
            stack.enter_context(converting(Path(model)))
            source = load_onnx_file(Path(model), task=task, labels=labels)
        else:
            source = load_source(model, task=task, labels=labels, seed=seed)
        base = base_fingerprint(source)
        _check_modules(loaded, source)
        if not isinstance(source, OnnxFile):
            for folder in folders.values():
                check_patterns(folder, source.model)
        loaded = prepare_stored(loaded, source, report)
        freezer = _freezer(source, bits, block_size)
        losses = Losses(source, loss, drift_penalty)
        targets = None if targets is None else source.resolve_targets(targets)
        if rank is not None:
            folder = folders[STARTING_ADAPTER] = scratch / STARTING_ADAPTER
            fresh = LoraOptions(rank, targets, lora_alpha, seed)
            if isinstance(source, OnnxFile):
                write_file_adapter(source, folder, fresh)
            else:
                write_starting_adapter(source, folder, fresh)
            loaded[STARTING_ADAPTER] = load_adapter(folder)
            _check_modules({STARTING_ADAPTER: loaded[STARTING_ADAPTER]}, source)
        for name, adapter in loaded.items():
            if not force:
                check_base(adapter, base)
            loaded[name] = dataclasses.replace(adapter, base=base)
        modules = _slot_modules(loaded, targets)
        saved = saved_module_names(source, loaded.values())
        if records is not None:
            assert isinstance(source, Source)
            report("calibrating")
            feeds = read_feeds(source, records, scratch / "calibration")
            freezer.quantized = calibrate(
                source.model,
                feeds,
                bits=freezer.bits,
                block_size=block_size,
                kept=saved,
                progress=progress,
            )
        report("tracing and quantizing the inference graph")
        inference = build_forward(source, freezer, modules=modules, modules_to_save=saved)
        for name, adapter in loaded.items():
            loaded[name] = without_unused(adapter, inference.slots, report)
            fit(loaded[name], inference.slots)
        forward = inference
        if train and source.own_training_graph:
            report("quantizing the training graph")
            forward = build_forward(source, freezer, modules=modules, modules_to_save=saved, training=True)
        folder = stack.enter_context(atomic_folder(output, MANIFEST_FILE))
        report("differentiating and writing" if train else "writing")
        manifest = write_contents(
            folder, source, freezer, inference, forward if train else None, loaded, losses
        )
        manifest = dataclasses.replace(manifest, base=base)
        if records is not None:
            calibrated = Calibration("gptq", len(records), tuple(freezer.rounded))
            manifest = dataclasses.replace(
                manifest, quantization=dataclasses.replace(manifest.quantization, calibration=calibrated)
            )
        report("measuring memory")
        manifest = with_memory(manifest, folder, source.length_unit)
        write_manifest(manifest, folder)
        verify_text(folder, source)
        if verify:
            if isinstance(source, OnnxFile):
                report("verifying against the file and finite differences")
                figures = verify_against_file(folder, source, freezer.reference, loaded, STARTING_ADAPTER)
            else:
                report("verifying against PyTorch")
                figures = verify_bundle(folder, source, freezer.reference, folders, STARTING_ADAPTER)
            manifest = dataclasses.replace(manifest, verification=figures)
            write_manifest(manifest, folder)
        return manifest


def _freezer(source: ModelSource, bits: int | None, block_size: int) -> Freezer:
    """What stores the weights; those of a source that is quantized already are left as they are."""
    if source.quantization is None:
        return Freezer(4 if bits is None else bits, block_size)
    if bits is not None:
        raise UsageError(
            f"--bits {bits}: the weights of {source.name} are quantized already (to "
            f"{source.quantization.bits} bits) and stay as they are: leave --bits out, or export the model "
            "that was quantized"
        )
    return Freezer(32, block_size)


def _check_arguments(
    bits: int | None, block_size: int, rank: int | None, adapters: Mapping[str, str | Path] | None
) -> None:
    if bits not in (None, 4, 8, 16, 32):
        raise UsageError(f"bits must be 4, 8, 16 or 32, got {bits}")
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if rank is not None and STARTING_ADAPTER in (adapters or {}):
        raise UsageError(f"an adapter is named {STARTING_ADAPTER!r}, the name that rank gives a fresh one")


def _check_modules(adapters: Mapping[str, Adapter], source: ModelSource) -> None:
    """Name the first module of an adapter that this model does not have, or has in another size."""
    called = source.called_linears() if adapters else set()
    for adapter in adapters.values():
        for name in adapter.modules:
            if not source.has_matrix(name):
                raise AdapterError(
                    f"{adapter.origin}: module {name} is no linear of {source.name}: "
                    "the adapter was made for another base"
                )
            if name not in called:
                raise AdapterError(
                    f"{adapter.origin}: {source.name} never calls its module {name} but hands its weight to "
                    "a function, so PEFT's LoRA has no effect there: train an adapter without it"
                )


def _slot_modules(adapters: Mapping[str, Adapter], targets: Sequence[str] | None) -> list[str] | None:
    """Modules that get a slot; None means every linear."""
    named = [module for adapter in adapters.values() for module in adapter.modules]
    return list(dict.fromkeys([*named, *(targets or [])])) or None
