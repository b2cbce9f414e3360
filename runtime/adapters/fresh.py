"""PEFT's configuration of an adapter that begins on the device."""

from collections.abc import Iterable
from typing import Any

from edgepeft.adapters import NO_TARGETS, TASK_TYPES
from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import UsageError
from edgepeft.slots import LORA, WHOLE, Slot
from edgepeft.techniques import peft_slots, technique
from edgepeft.techniques.base import PeftTechnique
from edgepeft.techniques.whole import biases


def fresh_technique(manifest: Manifest, method: str | None = None) -> PeftTechnique:
    """What a fresh adapter is of: `method`, or LoRA where the bundle has slots of it or none but of saved
    modules, else what its first slot is of.

    Raises:
        UsageError: the bundle has no slots of the method.
    """
    found = {item.name: item for _, item in peft_slots(manifest.slots)}
    if method is not None and method not in found:
        raise UsageError(
            f"method is {method!r}, the bundle has slots of {', '.join(found) or 'none'}: export the model "
            f"with --method {method}"
        )
    if method is not None:
        return found[method]
    lora = technique(LORA)
    assert isinstance(lora, PeftTechnique)
    return lora if LORA in found or not found else next(iter(found.values()))


def peft_config(manifest: Manifest, technique: PeftTechnique, slots: Iterable[Slot]) -> dict[str, Any]:
    """What every technique's configuration has, of an adapter that has something in these slots."""
    slots = tuple(slots)
    trained = [slot.module for slot in biases(slots)]
    targets = [slot.module for slot in slots if slot.technique == technique.name]
    saved = {slot.module for slot in slots if slot.technique == WHOLE} - set(trained)
    config = {
        "base_model_name_or_path": manifest.model.name,
        "inference_mode": True,
        "peft_type": technique.peft_type,
        "target_modules": targets or NO_TARGETS,
        "task_type": TASK_TYPES.get(manifest.task),
    }
    if technique.saves_modules:
        config["modules_to_save"] = sorted(saved) or None
    if technique.bias_of_targets is None:
        return config
    option = "all" if set(trained) - set(targets) else technique.bias_of_targets
    return config | {"bias": option if trained else "none"}


def fresh_slots(manifest: Manifest, technique: PeftTechnique) -> list[Slot]:
    """The slots that a fresh adapter of the technique has something in: PEFT puts nothing on a saved
    module, and trains biases only where a method has that option."""
    trained = biases(manifest.slots)
    without = trained if technique.bias_of_targets is None else []
    name, saved = technique.name, {slot.module for slot in manifest.slots_of(WHOLE) if slot not in trained}
    return [
        slot
        for slot in manifest.slots
        if (slot.technique == WHOLE and slot not in without)
        or (slot.technique == name and slot.module not in saved)
    ]
