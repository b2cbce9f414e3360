"""LoRA adapters whose initialization changed the base (PEFT's `init_lora_weights`).

PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ take a part of a weight, or its rounding error, for the start of the
factors and leave the base without it: `W + s (B A - B₀ A₀)` is computed with `W - s B₀ A₀` for a base. Such
an adapter says nothing over the base that it began from; a plain one of twice the rank, `[B | -B₀] [A; A₀]`,
does.

Sources: arXiv 2404.02948 (PiSSA), 2406.01775 (OLoRA), 2406.05223 (CorDA), 2407.05000 (LoRA-GA), 2310.08659
(LoftQ); `peft.LoraModel.subtract_mutated_init`.
"""

from collections.abc import Mapping
from typing import Any

from .errors import AdapterError

OPTION = "init_lora_weights"
#: Values with which the base stays as it is.
UNCHANGED: tuple[Any, ...] = (True, False, None, "gaussian", "orthogonal", "eva")
#: Values with which PEFT changes the base once more, and by the same, when it opens the folder.
REPEATABLE = ("pissa", "olora")

_BASE = (
    "or export the base that it was trained over (model.unload()) together with this adapter, saved after "
    f"model.peft_config['default'].{OPTION} = True"
)
_PLAIN = (
    "save it as a plain LoRA with PEFT's save_pretrained(DIR, path_initial_model_for_weight_conversion="
    "START), START being a folder with what it was before training"
)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the configuration's initialization changes the base's weights, or is none that is known."""
    value = config.get(OPTION)
    return not any(value == item and type(value) is type(item) for item in UNCHANGED)


def check_initialization(config: Mapping[str, Any], origin: str) -> None:
    """
    Raises:
        AdapterError: the adapter is of a base that its initialization changed.
    """
    if not changes_base(config):
        return
    value = config[OPTION]
    said = f"{origin}: {OPTION}={value!r} is not supported"
    if value == "loftq":
        raise AdapterError(f"{said}: it is of a base that was rounded by LoftQ: {_BASE.removeprefix('or ')}")
    if value in REPEATABLE:
        raise AdapterError(
            f"{said} without the float weights that it took a part of: give it to export, or {_PLAIN}"
        )
    if isinstance(value, str) and value.startswith(("pissa_niter_", "corda", "lora_ga")):
        raise AdapterError(f"{said}: what it took of the base's weights is not repeatable: {_PLAIN}, {_BASE}")
    raise AdapterError(f"{said}: train the adapter without it, or merge it")
