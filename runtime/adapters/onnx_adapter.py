"""Adapters in onnxruntime's own file format (`.onnx_adapter`), which its `LoraAdapter` reads.

The parameters of such a file are the adapter inputs of a bundle's inference graph, all of them and in the
graph's layout: those of every slot, with its neutral values where the adapter has nothing (a LoRA of rank 0,
the base's own saved module). So a program that has onnxruntime alone runs the graph with
`RunOptions.add_active_adapter` and feeds nothing but the model's inputs. Python's `InferenceSession.run` asks
for all inputs nevertheless: there, feed what `AdapterFormat.read_adapter(path).get_parameters()` returns with
`run_with_ort_values`.

The format has no place for PEFT's configuration, which is made anew when a file is read: values and scalings
come back bit for bit, and what the graph computes with them is the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import AdapterError
from edgepeft.files import atomic_path
from edgepeft.slots import LORA, SIZE, TRAINABLE_TOKENS, Slot
from edgepeft.techniques import of_slot, peft_slots
from edgepeft.techniques.base import FloatArray, PeftTechnique
from edgepeft.techniques.trainable_tokens import replaced_tokens
from edgepeft.token_rows import OPTION_OF_LORA

from ..session import ORT_ERRORS, one_line
from .fresh import fresh_technique, peft_config
from .graph_inputs import graph_inputs, to_peft_layout

SUFFIX = ".onnx_adapter"


def write_onnx_adapter(bundle: Bundle, adapter: Adapter, path: Path) -> None:
    """Write an adapter of a bundle as one file for onnxruntime's `LoraAdapter`.

    Raises:
        EdgePeftError: the file cannot be written.
    """
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in graph_inputs(bundle, [(adapter, 1.0)]).items()
    }
    file_format = ort.AdapterFormat()
    file_format.set_adapter_version(1)
    file_format.set_model_version(bundle.manifest.format_version)
    file_format.set_parameters(values)
    with atomic_path(path) as temporary:
        try:
            file_format.export_adapter(str(temporary))
        except ORT_ERRORS as error:
            raise OSError(one_line(error)) from error


def read_onnx_adapter(bundle: Bundle, path: Path) -> Adapter:
    """The adapter in a file of onnxruntime's format, made for this bundle's inference graph.

    Raises:
        AdapterError: the file is missing or damaged, or its parameters are not those of the graph.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    try:
        parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        inputs = {name: value.numpy().copy() for name, value in parameters.items()}
    except ORT_ERRORS as error:
        raise AdapterError(f"{path}: is damaged or no {SUFFIX} file ({one_line(error)})") from error
    _check(bundle.manifest, inputs, path)
    manifest = bundle.manifest
    kept: list[tuple[Slot, dict[str, FloatArray]]] = []
    for slot in manifest.slots:
        values = {name: inputs[name] for name in slot.inputs}
        neutral = of_slot(slot).neutral(slot, bundle.read_weight)
        if any(not np.array_equal(values[name], array) for name, array in neutral.items()):
            kept.append((slot, values))
    technique = _technique(manifest, [slot for slot, _ in kept], path)
    own = [(slot, values) for slot, values in kept if slot.technique == technique.name]
    config = peft_config(manifest, technique, [slot for slot, _ in kept])
    config |= technique.config_of(own, str(path))
    if technique.name != TRAINABLE_TOKENS:
        rows = [(slot, values) for slot, values in kept if slot.technique == TRAINABLE_TOKENS]
        config |= {
            OPTION_OF_LORA: {slot.module: replaced_tokens(slot, values) for slot, values in rows} or None
        }
    tensors = to_peft_layout(bundle, {name: array for _, values in kept for name, array in values.items()})
    return Adapter(config, tensors, str(path))


def _technique(manifest: Manifest, slots: Sequence[Slot], path: Path) -> PeftTechnique:
    """The technique of an adapter with something in these slots."""
    by_name = {item.name: item for _, item in peft_slots(slots)}
    found = list(by_name.values())
    if TRAINABLE_TOKENS in by_name and found[0].peft_type == LORA.upper():  # which may have rows beside it
        found = [item for item in found if item.name != TRAINABLE_TOKENS]
    if len(found) > 1:
        raise AdapterError(
            f"{path}: is {found[0].title} and {found[1].title} at once, which PEFT's format cannot hold"
        )
    return found[0] if found else fresh_technique(manifest)


def _check(manifest: Manifest, inputs: dict[str, FloatArray], path: Path) -> None:
    """Check the parameters against the graph's adapter inputs."""
    expected: dict[str, tuple[int, ...]] = {}
    for slot in manifest.slots:
        size = _size(slot, inputs)
        expected |= {tensor.input: tensor.sized(size) for tensor in slot.tensors}
    for name in sorted(expected.keys() | inputs.keys()):
        if name not in inputs:
            raise AdapterError(f"{path}: lacks the parameter {name!r}: the file was made for another bundle")
        if name not in expected:
            raise AdapterError(
                f"{path}: has a parameter {name!r}, which is no adapter input of this bundle: the file was "
                "made for another"
            )
        got = inputs[name]
        if got.shape != expected[name] or got.dtype != np.float32:
            raise AdapterError(
                f"{path}: parameter {name!r} is {list(got.shape)} of {got.dtype}, expected "
                f"{list(expected[name])} of float32: the file was made for another bundle"
            )


def _size(slot: Slot, inputs: Mapping[str, FloatArray]) -> int:
    """The size that the last of a slot's parameters with a free axis says."""
    size = 0
    for tensor in slot.tensors:
        array = inputs.get(tensor.input)
        if SIZE in tensor.shape and array is not None and array.ndim == len(tensor.shape):
            size = int(array.shape[tensor.shape.index(SIZE)])
    return size
