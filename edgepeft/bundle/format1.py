"""Format 1 of the manifest, read as today's: `lora_slots` and `saved_modules` become `slots`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BundleError
from ..slots import Slot
from ..techniques import lora, whole
from .decode import decode


@dataclass(frozen=True)
class LoraSlot:
    """A linear module that takes a LoRA. `a_input` and `b_input` were PEFT's state-dict keys, too."""

    module: str
    in_features: int
    out_features: int
    a_input: str
    b_input: str
    scaling_input: str
    activation_axes: int = 0


@dataclass(frozen=True)
class SavedModule:
    """A parameter that an adapter replaces whole; `default` is a tensor of `weights.bin`."""

    module: str
    parameter: str
    input: str
    shape: tuple[int, ...]
    default: str


def upgraded(data: dict[str, Any], where: str) -> dict[str, Any]:
    """A manifest of format 1, parsed from JSON, as one of format 2 that is still to be checked.

    Raises:
        BundleError: what the formats differ in is missing or of the wrong type.
    """
    kinds = {"lora_slots": tuple[LoraSlot, ...], "saved_modules": tuple[SavedModule, ...]}
    for name in kinds:
        if name not in data:
            raise BundleError(f"{where}: lacks the field {name!r}")
    if "slots" in data:
        raise BundleError(f"{where}: has an unknown field 'slots'")
    linears, saved = (decode(kind, data[name], f"{where}.{name}") for name, kind in kinds.items())
    slots = [
        _with_inputs(
            lora.new_slot(item.module, item.in_features, item.out_features, item.activation_axes),
            (item.a_input, item.b_input, item.scaling_input),
        )
        for item in linears
    ]
    slots += [
        _with_inputs(whole.new_slot(item.module, item.parameter, item.shape, item.default), (item.input,))
        for item in saved
    ]
    kept = {name: value for name, value in data.items() if name not in kinds}
    as_lists = json.loads(json.dumps([dataclasses.asdict(slot) for slot in slots]))
    return kept | {"format_version": 2, "slots": as_lists}


def _with_inputs(slot: Slot, names: Sequence[str]) -> Slot:
    tensors = [
        dataclasses.replace(tensor, input=name) for tensor, name in zip(slot.tensors, names, strict=True)
    ]
    return dataclasses.replace(slot, tensors=tuple(tensors))
