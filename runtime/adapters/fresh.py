"""PEFT's configuration of an adapter that begins on the device."""

from typing import Any

from edgepeft.adapters import TASK_TYPES
from edgepeft.bundle.manifest import LoraSlot, Manifest


def fresh_config(manifest: Manifest, rank: int) -> dict[str, Any]:
    """PEFT's configuration of a LoRA of this rank on every slot, with the base's own saved modules."""
    saved = sorted({module.module for module in manifest.saved_modules})
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
        "target_modules": [slot.module for slot in fresh_slots(manifest)],
        "task_type": TASK_TYPES.get(manifest.task),
        "use_dora": False,
        "use_rslora": False,
    }


def fresh_slots(manifest: Manifest) -> list[LoraSlot]:
    """The slots that a fresh adapter has a LoRA in."""
    saved = {module.module for module in manifest.saved_modules}
    return [slot for slot in manifest.lora_slots if slot.module not in saved]
