"""What a bundle holds: its graphs, their weights, adapters and tokenizer, and the manifest that says so."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

import edgepeft
from edgepeft.adapters import Adapter, write_adapter
from edgepeft.bundle.manifest import (
    CHECKPOINTED,
    DECODER,
    FORMAT_VERSION,
    FORWARD_ONLY,
    RESIDENT,
    STREAMED,
    STREAMED_INFERENCE,
    Manifest,
    Policy,
    Strategy,
)
from edgepeft.bundle.memory_formula import UNKNOWN_MEMORY
from edgepeft.bundle.wiring import Stage, StreamedInference
from edgepeft.bundle.writer import hash_folder
from edgepeft.techniques import of_slot

from .forward import Forward
from .losses import Loss, loss_for, with_drift
from .partition import Partitioned, StreamedGraphs, Uncut, build_partition, build_streamed_inference
from .quantize.freeze import Freezer
from .sources.base import ModelSource
from .sources.model_info import model_info
from .training.joint import build_joint, build_loss
from .training.optimizer import build_adamw, build_grad_norm
from .training.optimizer8 import build_adamw8
from .writer import WeightWriter, graph_spec, rename_others, write_graph

WEIGHTS_FILE = "weights.bin"


@dataclasses.dataclass(frozen=True)
class Losses:
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


def write_contents(
    folder: Path,
    source: ModelSource,
    freezer: Freezer,
    inference: Forward,
    training: Forward | None,
    adapters: Mapping[str, Adapter],
    losses: Losses,
) -> Manifest:
    """Write everything but the manifest, whose memory figures are still empty."""
    loss = losses.judged
    if training is not None and training is not inference:
        rename_others(training.model.graph, inference.model.graph)
    models = {"inference": inference.model}
    missing: dict[str, str] = {}
    if inference.decoder is not None:
        models |= inference.decoder.graphs
    elif inference.undecoded is not None:
        missing[DECODER] = inference.undecoded
    if training is not None and not any(tensor.trains for slot in training.slots for tensor in slot.tensors):
        ways = (RESIDENT, CHECKPOINTED, STREAMED, FORWARD_ONLY)
        training, missing = None, missing | dict.fromkeys(ways, "there is no slot for an adapter")
    streamed: StreamedGraphs | None = None
    if source.task == "text2text-generation":
        missing[STREAMED_INFERENCE] = "every layer of the decoder reads what the encoder made"
    else:
        chain = build_streamed_inference(inference, slice_output=source.task == "text-generation")
        if isinstance(chain, Uncut):
            missing[STREAMED_INFERENCE] = chain.because
        else:
            streamed = chain
            models |= chain.graphs
    trainable: tuple[str, ...] = ()
    partition: Partitioned | None = None
    if training is not None:
        output = next(value for value in training.model.graph.outputs if value.name == loss.output)
        trained = losses.trained(output)
        joint = build_joint(training, trained)
        trainable = joint.trainable
        models |= {"train": joint.model, "loss": build_loss(loss, output)}
        models |= {"adamw": build_adamw(), "adamw8": build_adamw8(), "grad_norm": build_grad_norm()}
        stages: Partitioned | Uncut = Uncut(
            "in stages there is no room for the logits that the penalty needs"
        )
        if trained is loss:
            stages = build_partition(training, loss)
        else:
            missing[FORWARD_ONLY] = "only the training graph's loss has the drift penalty"
        if isinstance(stages, Uncut):
            missing |= dict.fromkeys((CHECKPOINTED, STREAMED), stages.because)
        else:
            partition = stages
            models |= stages.graphs
    row_scalings = _row_scalings(inference, None if streamed is None else streamed.wiring)
    (folder / "graphs").mkdir()
    served = {"inference", *({} if inference.decoder is None else inference.decoder.graphs)}
    graphs = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightWriter(file)
        if inference.decoder is not None:  # first, so that the other graphs find their weights in its own
            inference.decoder.write_weights(weights)
        for role, graph in models.items():
            path = f"graphs/{role}.onnx"
            write_graph(graph, folder / path, weights, WEIGHTS_FILE, row_scalings.get(role, ()))
            graphs[role] = graph_spec(graph, path, serves=role in served)
        if training is not None and partition is not None:
            wiring = partition.wiring
            _write_small(weights, training.model.graph, wiring.context_weights, wiring.stages_and_head)
        if streamed is not None:
            _write_small(
                weights, inference.model.graph, streamed.wiring.context_weights, streamed.wiring.stages
            )
        for name, value in inference.saved_values.items():
            weights.add_array(name, value.float().numpy())
    for name, adapter in adapters.items():
        (folder / "adapters" / name).mkdir(parents=True)
        write_adapter(adapter, folder / "adapters" / name)
    for name, data in source.tokenizer_files.items():
        (folder / name).write_bytes(data)
    return Manifest(
        format_version=FORMAT_VERSION,
        edgepeft_version=edgepeft.__version__,
        task=source.task,
        model=model_info(source, losses.name),
        quantization=source.quantization or freezer.described(),
        graphs=graphs,
        inference_memory=UNKNOWN_MEMORY,
        weights_file=WEIGHTS_FILE,
        weights=weights.tensors,
        slots=inference.slots,
        adapters=tuple(adapters),
        strategies=_strategies(missing) if training else (),
        policy=Policy(trainable=trainable),
        verification={},
        files=hash_folder(folder),
        partition=None if partition is None else partition.wiring,
        streamed_inference=None if streamed is None else streamed.wiring,
        image_preprocessing=source.image_preprocessing,
        audio_preprocessing=source.audio_preprocessing,
        decoder=None if inference.decoder is None else inference.decoder.wiring,
        linear_head=inference.linear_head,
        missing=missing,
    )


def _write_small(
    weights: WeightWriter, graph: ir.Graph, context: Mapping[str, str], stages: Iterable[Stage]
) -> None:
    """Store those weights of a chain that the graphs have inside them."""
    for name in (*context.values(), *(key for stage in stages for key in stage.weights.values())):
        if name not in weights.tensors:
            tensor = graph.initializers[name].const_value
            assert tensor is not None
            weights.add(name, tensor)


def _row_scalings(inference: Forward, streamed: StreamedInference | None) -> dict[str, set[str]]:
    """By role of an inference graph, its inputs that may have an axis for the batch, such as scalings."""
    keys = {slot.input(name) for slot in inference.slots for name in of_slot(slot).by_row}
    found = {"inference": keys}
    for stage in () if streamed is None else streamed.stages:
        scalings = {name for name, key in stage.adapter.items() if key in keys}
        found[stage.forward] = found.get(stage.forward, set()) | scalings
    return found


def _strategies(missing: Mapping[str, str]) -> tuple[Strategy, ...]:
    """Ways to train, the fastest first, without those that are missing; their memory is still to be
    measured."""
    strategies = (
        Strategy(RESIDENT, "train", exact=True, memory=UNKNOWN_MEMORY),
        Strategy(CHECKPOINTED, None, exact=True, memory=UNKNOWN_MEMORY),
        Strategy(STREAMED, None, exact=True, memory=UNKNOWN_MEMORY),
        Strategy(FORWARD_ONLY, None, exact=False, memory=UNKNOWN_MEMORY),
    )
    return tuple(strategy for strategy in strategies if strategy.name not in missing)
