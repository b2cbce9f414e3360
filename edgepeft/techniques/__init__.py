"""Techniques by name: what an adapter's tensors mean, for the exporter and the device.

A technique is a module of this package, imported when it is named, with its `TECHNIQUE`; what it does to a
graph is in `edgepeft.exporters.techniques`. One that PEFT has a type of adapters for is named like that type.
"""

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import AdapterError
from ..slots import Slot
from .base import PeftTechnique, Technique

_SHARED = ("base", "factors", "lora_sites")  # what techniques have in common
MODULES = {
    item.name: f"{__name__}.{item.name}"
    for item in pkgutil.iter_modules(__path__)
    if item.name not in _SHARED
}
"""Of every technique, by its name, the module that has it."""


@functools.cache
def technique(name: str) -> Technique:
    """The technique of a name that is in `MODULES`."""
    found = importlib.import_module(MODULES[name]).TECHNIQUE
    assert isinstance(found, Technique)
    return found


def of_slot(slot: Slot) -> Technique:
    """The technique of a slot of a checked manifest."""
    return technique(slot.technique)


def is_in_decoder(slot: Slot) -> bool:
    """Whether the decoder's graph has the slot's own inputs; a LoRA on a linear stands in its groups."""
    return not slot.is_packed and of_slot(slot).in_decoder(slot.module)


def peft_slots(slots: Iterable[Slot]) -> list[tuple[Slot, PeftTechnique]]:
    """The slots of techniques that PEFT has a type of adapters for, each with its technique."""
    found = [(slot, of_slot(slot)) for slot in slots]
    return [(slot, item) for slot, item in found if isinstance(item, PeftTechnique)]


def peft_methods() -> list[str]:
    """The names of the techniques that PEFT has a type of adapters for."""
    return [name for name in MODULES if isinstance(technique(name), PeftTechnique)]


def of_config(config: Mapping[str, Any], origin: str) -> PeftTechnique:
    """The technique of an adapter with this configuration, which it has checked.

    Raises:
        AdapterError: there is none, or the configuration asks for what it does not compute.
    """
    if not isinstance(config, dict):
        raise AdapterError(
            f"{origin}: adapter_config.json holds a {type(config).__name__}, expected an object"
        )
    peft_type = config.get("peft_type")
    offered = [item for item in map(technique, MODULES) if isinstance(item, PeftTechnique)]
    found = next((item for item in offered if item.peft_type == peft_type and item.is_of(config)), None)
    if found is None:
        known = ", ".join(dict.fromkeys(item.peft_type for item in offered))
        raise AdapterError(
            f"{origin}: peft_type is {peft_type!r}, edgepeft runs {known} adapters: train one of these, or "
            "merge it into its base (PEFT's merge_and_unload) and export that"
        )
    found.check_config(config, origin)
    return found
