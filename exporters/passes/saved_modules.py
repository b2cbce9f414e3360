"""Modules that an adapter replaces whole (PEFT's `modules_to_save`): their weights stay graph inputs."""

from collections.abc import Iterable

import onnx_ir as ir

from edgepeft.bundle.manifest import SavedModule
from edgepeft.errors import ExportError

from .lora import PEFT_PREFIX


def keep_saved_modules(weights: dict[str, ir.Value], modules: Iterable[str]) -> list[SavedModule]:
    """Rename the weight inputs of `modules` to PEFT's state-dict keys and take them out of `weights`.

    Raises:
        ExportError: a module has no weight in the graph.
    """
    saved = []
    for module in modules:
        names = [name for name in weights if name.startswith(f"{module}.") or f".{module}." in name]
        if not names:
            raise ExportError(
                f"modules_to_save names {module!r}, but no weight of that module is in the graph"
            )
        for name in names:
            value = weights.pop(name)
            assert value.shape is not None
            owner, parameter = name.rsplit(".", 1)
            value.name = f"{PEFT_PREFIX}{name}"
            saved.append(
                SavedModule(
                    module=owner,
                    parameter=parameter,
                    input=value.name,
                    shape=tuple(int(dim) for dim in value.shape),  # type: ignore[arg-type]
                    default=name,
                )
            )
    return saved
