"""Modules that an adapter replaces whole (PEFT's `modules_to_save`): their weights stay graph inputs."""

from collections.abc import Collection, Iterable

import onnx_ir as ir

from edgepeft.slots import PREFIX, Slot
from edgepeft.techniques import whole

from ..graph import transposed_input


def keep_saved_modules(
    graph: ir.Graph, weights: dict[str, ir.Value], modules: Iterable[str], turned: Collection[str] = ()
) -> list[Slot]:
    """Rename the weight inputs of `modules` to PEFT's state-dict keys and take them out of `weights`; what
    nothing reads stays there. Those in `turned` become inputs as PyTorch and PEFT have them.
    """
    prefixes = tuple(f"{module}." for module in modules)
    saved = []
    for name in [name for name, value in weights.items() if name.startswith(prefixes) and value.uses()]:
        value = weights.pop(name)
        if name in turned:
            graph.inputs.remove(value)
            value = transposed_input(graph, value)
            graph.inputs.append(value)
        assert value.shape is not None
        owner, parameter = name.rsplit(".", 1)
        value.name = f"{PREFIX}{name}"
        saved.append(whole.new_slot(owner, parameter, value.shape.numpy(), name))
    return saved
