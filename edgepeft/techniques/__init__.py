"""Techniques by name: what an adapter's tensors mean, for the exporter and the device.

A technique is a module of this package, imported when it is named, with its `TECHNIQUE`; what it does to a
graph is in `edgepeft.exporters.techniques`.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError
from ..slots import LORA, WHOLE, Slot
from .base import PeftTechnique, Technique

NAMES = (LORA, WHOLE)
"""Of all techniques."""

PEFT_TYPES = {"LORA": LORA}
"""Those that PEFT has a type of adapters for."""


@functools.cache
def technique(name: str) -> Technique:
    """The technique of a name that is one of `NAMES`."""
    found = importlib.import_module(f".{name}", __name__).TECHNIQUE
    assert isinstance(found, Technique)
    return found


def of_slot(slot: Slot) -> Technique:
    """The technique of a slot of a checked manifest."""
    return technique(slot.technique)


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
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPES:
        raise AdapterError(
            f"{origin}: peft_type is {peft_type!r}, edgepeft runs {', '.join(PEFT_TYPES)} adapters"
        )
    found = technique(PEFT_TYPES[peft_type])
    assert isinstance(found, PeftTechnique)
    found.check_config(config, origin)
    return found
