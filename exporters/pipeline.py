"""`edgepeft.export`: from a model and its adapters to a verified bundle."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgepeft.adapter_fit import fit
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.validation import TOKENLESS
from edgepeft.bundle.writer import MANIFEST_FILE, write_manifest
from edgepeft.errors import UsageError
from edgepeft.files import atomic_folder, check_replaceable, temporary_folder
from edgepeft.slots import LORA
from edgepeft.techniques.base import Settings

from .base_fingerprint import base_fingerprint
from .calibration.calibrate import Progress
from .calibration.groups import Feeds
from .calibration.records import usable_records
from .calibration.rounding import calibrated, is_calibrated, representative
from .contents import Losses, write_contents
from .forward import build_forward
from .measure.bundle import with_memory
from .options import ExportOptions
from .quantize.freeze import Freezer
from .shrink.pruning import check_adapters, check_prunable, prune_source
from .shrink.vocabulary import trim_vocabulary, vocabulary_records
from .sources.base import ModelSource
from .sources.model_info import model_info, saved_module_names
from .sources.open import opened_source
from .techniques import graph_technique, plain_slots
from .techniques.prepare import Adapters, prepare_adapters, read_adapters, read_others
from .techniques.stored_modules import without_unused
from .training.dropout import dropped_modules, with_dropout
from .verify.bundle import verify_bundle
from .verify.text import verify_text
from .versions import outside_range

Report = Callable[[str], None]


def export(
    model: Any,
    output: str | Path,
    *,
    report: Report = lambda _: None,
    progress: Progress = lambda _done, _total: None,
    **options: Any,
) -> Manifest:
    """Export `model` and adapters of it as one bundle and check it against PyTorch, or against the ONNX file.

    Args:
        model: a transformers model object, a folder, a hub id, the path of a GGUF file (`….gguf`), whose
            weights are decoded and rounded anew, or that of an ONNX file (`….onnx`) that somebody else
            exported. A PEFT model or an adapter's folder is exported merged into its base.
        output: the bundle's folder; a bundle that is there is replaced, anything else refused.
        report: is told the name of each stage.
        progress: is told how many weights of how many are calibrated.
        **options: see `ExportOptions`: `task`, `bits`, `adapters`, `rank`, `targets`, ….

    Returns:
        The bundle's manifest.

    Raises:
        UsageError: an argument cannot be used.
        ExportError: the model cannot be exported.
        DataError: a calibration record cannot be used, or there is none.
        AdapterError: an adapter does not fit the model, was trained on another or has no effect.
        VerificationError: the bundle disagrees with PyTorch or with the file; nothing is written.
    """
    chosen, output = ExportOptions.of(options), Path(output)
    if untried := outside_range():
        report(f"not run with {', '.join(untried)}: trying")
    records = usable_records(chosen, model)
    kept_records = vocabulary_records(chosen, model)
    check_replaceable(output, MANIFEST_FILE)
    with ExitStack() as stack:
        scratch = stack.enter_context(temporary_folder())
        adapters = read_adapters(chosen)
        report("loading the model")
        source = stack.enter_context(
            opened_source(model, task=chosen.task, labels=chosen.labels, seed=chosen.seed)
        )
        if chosen.max_length is not None:
            source.max_length = _shorter(source, chosen.max_length)
        if chosen.targets is not None:
            chosen = dataclasses.replace(chosen, targets=source.resolve_targets(chosen.targets))
        _check_rounding(source, records, chosen)
        adapters = read_others(adapters, source, scratch)
        model_info(source)  # which refuses configurations, before a trace takes its minutes
        base = base_fingerprint(source)
        if kept_records:  # of the whole base: an adapter of that, or for that, fits here too
            report("trimming the vocabulary")
            trim_vocabulary(source, kept_records, adapters.loaded, scratch)
        freezer = _freezer(source, chosen)
        rounds = is_calibrated(source, records, chosen, freezer.bits)
        if chosen.prune is not None:
            check_prunable(source, records)
        feeds: list[Feeds] = []
        if rounds or chosen.prune is not None:
            report("reading the records" if records else "writing text of the model's own")
            feeds = representative(source, records, chosen, scratch / "records")
        pruning = None
        if chosen.prune is not None:
            report("pruning")
            pruning = prune_source(source, feeds, chosen, progress)
            base = base_fingerprint(source)
        if pruning is not None and not chosen.force:
            check_adapters(adapters.loaded.values(), base)
        adapters = prepare_adapters(adapters, source, base, chosen, scratch, report)
        losses = Losses(source, chosen.loss, chosen.drift_penalty)
        saved = saved_module_names(source, adapters.loaded.values())
        calibration = None
        if rounds:
            report("calibrating" if records else "calibrating on text of the model's own")
            calibration = calibrated(source, feeds, chosen, freezer, saved, progress)
        report("tracing and quantizing the inference graph")
        modules = _modules(adapters, source, chosen)
        inference = training = build_forward(source, freezer, modules=modules, modules_to_save=saved)
        for name, adapter in adapters.loaded.items():
            adapters.loaded[name] = without_unused(adapter, inference.slots, report)
            fit(adapters.loaded[name], inference.slots)
        if chosen.train and source.own_training_graph:
            report("quantizing the training graph")
            training = build_forward(source, freezer, modules=modules, modules_to_save=saved, training=True)
        if chosen.train:
            training = with_dropout(training, dropped_modules(adapters.loaded.values()))
        folder = stack.enter_context(atomic_folder(output, MANIFEST_FILE))
        report("differentiating and writing" if chosen.train else "writing")
        manifest = write_contents(
            folder, source, freezer, inference, training if chosen.train else None, adapters.loaded, losses
        )
        if calibration is not None:
            calibration = dataclasses.replace(calibration, rounded=tuple(freezer.rounded))
        quantization = dataclasses.replace(manifest.quantization, calibration=calibration)
        manifest = dataclasses.replace(manifest, base=base, quantization=quantization, pruning=pruning)
        report("measuring memory")
        manifest = with_memory(manifest, folder, source.length_unit)
        write_manifest(manifest, folder)
        verify_text(folder, source)
        if chosen.verify:
            figures = verify_bundle(folder, source, freezer.reference, adapters, report)
            manifest = dataclasses.replace(manifest, verification=figures)
            write_manifest(manifest, folder)
        return manifest


def _check_rounding(source: ModelSource, records: Sequence[object], options: ExportOptions) -> None:
    """
    Raises:
        UsageError: an option says how to round weights that stay as they are.
    """
    given = {
        "--calibration": bool(records),
        "--size": options.size is not None,
        "--prune": options.prune is not None,
    }
    named = next((name for name, is_given in given.items() if is_given), None)
    if named is not None and source.quantized and options.bits is None:
        raise UsageError(
            f"{named}: the weights of {source.name} are quantized already and stay as they are: "
            "leave it out, or say with --bits how they are to be rounded once more"
        )


def _shorter(source: ModelSource, max_length: int) -> int:
    """`max_length`, where the source reads as many tokens.

    Raises:
        UsageError: it reads fewer, or none.
    """
    if source.task in TOKENLESS:
        raise UsageError(
            f"--max-length counts tokens, and a model for {source.task} reads none: leave it out"
        )
    if max_length > source.max_length:
        raise UsageError(f"--max-length {max_length}: {source.name} reads at most {source.max_length} tokens")
    return max_length


def _modules(
    adapters: Adapters, source: ModelSource, options: ExportOptions
) -> dict[str, dict[str, Settings]] | None:
    """Modules that get a slot, with its settings, by technique; None where nothing says which."""
    found, method = adapters.modules, options.method
    if method == LORA:  # of ends of names, too
        added = plain_slots(options.targets or ())
    else:
        added = graph_technique(method).fresh_modules(source, options)
    found[method] = added | found.get(method, {})
    for name, own in found.items():
        if own:
            graph_technique(name).check(source, options)
    return found if any(found.values()) or options.targets is not None else None


def _freezer(source: ModelSource, options: ExportOptions) -> Freezer:
    """What stores the weights; those of a source that is quantized already are left as they are, unless
    `--bits` says how to round what they stand for."""
    if source.quantized and options.bits is None:
        return Freezer(32, options.block_size, source.quantized)
    if source.quantization is None:
        return Freezer(4 if options.bits is None else options.bits, options.block_size)
    if options.bits is not None:
        raise UsageError(
            f"--bits {options.bits}: the weights of {source.name} are quantized already (to "
            f"{source.quantization.bits} bits) and stay as they are: leave --bits out, or export the model "
            "that was quantized"
        )
    return Freezer(32, options.block_size)
