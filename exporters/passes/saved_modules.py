"""Modules that an adapter replaces whole (PEFT's `modules_to_save`): their weights stay graph inputs."""

from collections.abc import Iterable

import onnx_ir as ir

from edgepeft.bundle.manifest import SavedModule

from .lora import PEFT_PREFIX


def keep_saved_modules(weights: dict[str, ir.Value], modules: Iterable[str]) -> list[SavedModule]:
    """Rename the weight inputs of `modules` to PEFT's state-dict keys and take them out of `weights`."""
    prefixes = tuple(f"{module}." for module in modules)
    saved = []
    for name in [name for name in weights if name.startswith(prefixes)]:
        value = weights.pop(name)
        assert value.shape is not None
        owner, parameter = name.rsplit(".", 1)
        value.name = f"{PEFT_PREFIX}{name}"
        saved.append(
            SavedModule(
                module=owner,
                parameter=parameter,
                input=value.name,
                shape=tuple(value.shape.numpy()),
                default=name,
            )
        )
    return saved
