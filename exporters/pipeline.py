"""`edgepeft.export`: from a model and its adapters to a verified bundle."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnx_ir as ir

import edgepeft
from edgepeft.adapters import Adapter, fit, load_adapter, write_adapter
from edgepeft.bundle.manifest import (
    CHECKPOINTED,
    FORMAT_VERSION,
    FORWARD_ONLY,
    RESIDENT,
    STREAMED,
    Calibration,
    Manifest,
    MemoryFormula,
    Policy,
    Quantization,
    Strategy,
    StreamedInference,
)
from edgepeft.bundle.writer import MANIFEST_FILE, hash_folder, write_manifest
from edgepeft.errors import AdapterError, UsageError
from edgepeft.files import atomic_folder, check_replaceable

from .calibration import Progress, calibrate
from .calibration_records import read_feeds, usable_records
from .forward import Forward, build_forward
from .inference_memory import measure_streamed
from .losses import Loss, loss_for, with_drift
from .model_info import model_info, saved_module_names
from .partition import build_partition, build_streamed_inference
from .passes.quantize import Freezer
from .quantization import BLOCK_SIZES
from .sources.base import ModelSource
from .sources.loading import Source, load_source
from .sources.onnx_file import OnnxFile, is_onnx_file, load_onnx_file
from .starting_adapter import LoraOptions, write_file_adapter, write_starting_adapter
from .training.chain_memory import measure_chain_peaks
from .training.joint import build_joint, build_loss
from .training.memory import measure_peaks
from .training.optimizer import build_adamw, build_grad_norm
from .training.optimizer8 import build_adamw8
from .training.probe import FORWARD, STAGES, with_session
from .verify import verify_bundle
from .verify_file import verify_against_file
from .writer import WeightWriter, graph_spec, write_graph

WEIGHTS_FILE = "weights.bin"
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
    report: Report = lambda _: None,
    progress: Progress = lambda _done, _total: None,
) -> Manifest:
    """Export `model` and `adapters` as one bundle and check it against PyTorch, or against the ONNX file.

    Args:
        model: a transformers model object, a folder, a hub id, or the path of an ONNX file (`….onnx`) that
            somebody else exported.
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
        verify: compare logits, losses and gradients with PyTorch (of an ONNX file: outputs with the file's,
            gradients with finite differences), and refuse a bundle that differs.
        seed: draws a new head and a fresh adapter.
        report: is told the name of each stage.
        progress: is told how many weights of how many are calibrated.

    Returns:
        The bundle's manifest.

    Raises:
        UsageError: an argument cannot be used.
        ExportError: the model cannot be exported.
        DataError: a calibration record cannot be used, or there is none.
        AdapterError: an adapter does not fit the model or has no effect.
        VerificationError: the bundle disagrees with PyTorch or with the file; nothing is written.
    """
    _check_arguments(bits, block_size, rank, adapters)
    records = None if calibration is None else usable_records(calibration, model, bits)
    output = Path(output)
    check_replaceable(output, MANIFEST_FILE)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgepeft-")))
        folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
        loaded = {name: load_adapter(folder) for name, folder in folders.items()}
        report("loading the model")
        source: Source | OnnxFile
        if is_onnx_file(model):
            source = load_onnx_file(Path(model), task=task, labels=labels)
        else:
            source = load_source(model, task=task, labels=labels, seed=seed)
        freezer = _freezer(source, bits, block_size)
        losses = _Losses(source, loss, drift_penalty)
        targets = None if targets is None else source.resolve_targets(targets)
        if rank is not None:
            folder = folders[STARTING_ADAPTER] = scratch / STARTING_ADAPTER
            fresh = LoraOptions(rank, targets, lora_alpha, seed)
            if isinstance(source, OnnxFile):
                write_file_adapter(source, folder, fresh)
            else:
                write_starting_adapter(source, folder, fresh)
            loaded[STARTING_ADAPTER] = load_adapter(folder)
        _check_modules(loaded, source)
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
        for adapter in loaded.values():
            fit(adapter, inference.slots, inference.saved_modules)
        forward = inference
        if train and source.own_training_graph:
            report("tracing the training graph")
            forward = build_forward(source, freezer, modules=modules, modules_to_save=saved, training=True)
        folder = stack.enter_context(atomic_folder(output, MANIFEST_FILE))
        report("differentiating and writing" if train else "writing")
        manifest = _write(folder, source, freezer, inference, forward if train else None, loaded, losses)
        if records is not None:
            calibrated = Calibration("gptq", len(records), tuple(freezer.rounded))
            manifest = dataclasses.replace(
                manifest, quantization=dataclasses.replace(manifest.quantization, calibration=calibrated)
            )
        report("measuring memory")
        manifest = _with_memory(manifest, folder, source.length_unit)
        write_manifest(manifest, folder)
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


@dataclasses.dataclass(frozen=True)
class _Losses:
    """What an adapter is judged by on the device, and what it is trained with."""

    source: ModelSource
    name: str | None
    drift_penalty: bool

    @property
    def judged(self) -> Loss:
        """The task's loss, or the one that was named."""
        return loss_for(self.source.task, self.source.problem_type, self.name)

    def trained(self, output: ir.Value) -> Loss:
        """The same, with the drift penalty if there is to be one."""
        judged = self.judged
        if not self.drift_penalty:
            return judged
        assert output.shape is not None
        return with_drift(judged, tuple(str(dim) for dim in list(output.shape)[:-1]))


def _write(
    folder: Path,
    source: ModelSource,
    freezer: Freezer,
    inference: Forward,
    training: Forward | None,
    adapters: Mapping[str, Adapter],
    losses: "_Losses",
) -> Manifest:
    """Write everything but the manifest, whose memory figures are still empty."""
    loss = losses.judged
    models = {"inference": inference.model}
    if inference.decoder is not None:
        models |= inference.decoder.graphs
    streamed = None
    if source.task != "text2text-generation":  # every layer of a decoder reads what the encoder made
        streamed = build_streamed_inference(inference, slice_output=source.task == "text-generation")
        models |= {} if streamed is None else streamed.graphs
    trainable: tuple[str, ...] = ()
    partition = None
    if training is not None:
        output = next(value for value in training.model.graph.outputs if value.name == loss.output)
        trained = losses.trained(output)
        joint = build_joint(training, trained)
        trainable = joint.trainable
        models |= {"train": joint.model, "loss": build_loss(loss, output)}
        models |= {"adamw": build_adamw(), "adamw8": build_adamw8(), "grad_norm": build_grad_norm()}
        # In stages there is no room for the base model's logits.
        partition = build_partition(training, loss) if trained is loss else None
        models |= {} if partition is None else partition.graphs
    row_scalings = _row_scalings(inference, None if streamed is None else streamed.wiring)
    (folder / "graphs").mkdir()
    graphs = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightWriter(file)
        if inference.decoder is not None:  # first, so that the other graphs find their weights in its own
            inference.decoder.write_weights(weights)
        for role, graph in models.items():
            path = f"graphs/{role}.onnx"
            write_graph(graph, folder / path, weights, WEIGHTS_FILE, row_scalings.get(role, ()))
            graphs[role] = graph_spec(graph, path)
        for name, value in inference.saved_values.items():
            weights.add_array(name, value.float().numpy())
    for name, adapter in adapters.items():
        (folder / "adapters" / name).mkdir(parents=True)
        write_adapter(adapter, folder / "adapters" / name)
    for name, data in source.tokenizer_files.items():
        (folder / name).write_bytes(data)
    unknown = MemoryFormula(session_bytes=0, peaks=())
    return Manifest(
        format_version=FORMAT_VERSION,
        edgepeft_version=edgepeft.__version__,
        task=source.task,
        model=model_info(source, losses.name),
        quantization=source.quantization
        or Quantization(freezer.bits, freezer.block_size, dict(freezer.exceptions)),
        graphs=graphs,
        inference_memory=unknown,
        weights_file=WEIGHTS_FILE,
        weights=weights.tensors,
        lora_slots=inference.slots,
        saved_modules=inference.saved_modules,
        adapters=tuple(adapters),
        strategies=_strategies(partition is not None, losses.drift_penalty) if training else (),
        policy=Policy(trainable=trainable),
        verification={},
        files=hash_folder(folder),
        partition=None if partition is None else partition.wiring,
        streamed_inference=None if streamed is None else streamed.wiring,
        image_preprocessing=source.image_preprocessing,
        audio_preprocessing=source.audio_preprocessing,
        decoder=None if inference.decoder is None else inference.decoder.wiring,
    )


def _row_scalings(inference: Forward, streamed: StreamedInference | None) -> dict[str, set[str]]:
    """By role of an inference graph, its inputs that are scalings, which may have an axis for the batch."""
    keys = {slot.scaling_input for slot in inference.slots}
    found = {"inference": keys}
    for stage in () if streamed is None else streamed.stages:
        scalings = {name for name, key in stage.adapter.items() if key in keys}
        found[stage.forward] = found.get(stage.forward, set()) | scalings
    return found


def _strategies(staged: bool, drift_penalty: bool) -> tuple[Strategy, ...]:
    """Ways to train, the fastest first; their memory is still to be measured."""
    unknown = MemoryFormula(session_bytes=0, peaks=())
    strategies = [Strategy(RESIDENT, "train", exact=True, memory=unknown)]
    if staged:
        strategies += [Strategy(name, None, exact=True, memory=unknown) for name in (CHECKPOINTED, STREAMED)]
    if not drift_penalty:  # only the training graph's loss has it
        strategies.append(Strategy(FORWARD_ONLY, None, exact=False, memory=unknown))
    return tuple(strategies)


def _with_memory(manifest: Manifest, folder: Path, length_unit: int) -> Manifest:
    """Measure the graphs; `folder` gets a manifest on the way, since the measuring process opens it as a
    bundle. Sequences that are measured are multiples of `length_unit`."""
    write_manifest(manifest, folder)
    batch_unit = 3 if manifest.model.loss == "triplet" else 1

    @functools.cache
    def formula(role: str) -> MemoryFormula:
        if role in (STAGES, FORWARD):
            peaks = measure_chain_peaks(folder, length_unit, batch_unit, backward=role == STAGES)
        else:
            spec = manifest.graphs[role]
            peaks = measure_peaks((folder / spec.file).read_bytes(), spec, folder, length_unit, batch_unit)
        return with_session(folder, role, MemoryFormula(session_bytes=0, peaks=peaks), length_unit)

    inference = formula("inference")
    streamed = manifest.streamed_inference
    if streamed is not None:
        streamed = dataclasses.replace(streamed, memory=measure_streamed(folder, length_unit))

    decoder = manifest.decoder
    if decoder is not None:
        int8 = None if decoder.int8_graph is None else formula(decoder.int8_graph)
        decoder = dataclasses.replace(decoder, memory=formula(decoder.graph), int8_memory=int8)

    def measured(strategy: Strategy) -> Strategy:
        if strategy.exact:
            memory = formula(strategy.graph or STAGES)
        else:
            memory = inference if manifest.partition is None else formula(FORWARD)
        return dataclasses.replace(strategy, memory=memory)

    return dataclasses.replace(
        manifest,
        inference_memory=inference,
        streamed_inference=streamed,
        decoder=decoder,
        strategies=tuple(measured(strategy) for strategy in manifest.strategies),
    )
