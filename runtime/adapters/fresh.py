"""PEFT's configuration of an adapter that begins on the device."""

from typing import Any

from edgepeft.adapters import TASK_TYPES
from edgepeft.bundle.manifest import Manifest
from edgepeft.slots import LORA, WHOLE, Slot


def fresh_config(manifest: Manifest, rank: int) -> dict[str, Any]:
    """PEFT's configuration of a LoRA of this rank on every slot, with the base's own saved modules."""
    saved = sorted({slot.module for slot in manifest.slots_of(WHOLE)})
    return {
        "base_model_name_or_path": manifest.model.name,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": [slot.module for slot in fresh_slots(manifest) if slot.technique == LORA],
        "task_type": TASK_TYPES.get(manifest.task),
        "use_dora": False,
        "use_rslora": False,
    }


def fresh_slots(manifest: Manifest) -> list[Slot]:
    """The slots that a fresh adapter has something in: PEFT puts no LoRA on a saved module."""
    saved = {slot.module for slot in manifest.slots_of(WHOLE)}
    return [slot for slot in manifest.slots if slot.technique == WHOLE or slot.module not in saved]
