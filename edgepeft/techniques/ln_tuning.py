"""Layer-norm tuning: weights, and biases where there are any, of normalizations that an adapter replaces.

Everything else of the base stays as it is stored. As in PEFT, one adapter is active at a time.

Source: arXiv 2312.11420; `peft.tuners.ln_tuning`.
"""

from collections.abc import Mapping

from ..errors import AdapterError
from ..slots import PARAMETER, PREFIX, Slot, SlotTensor
from .base import Held, PeftTechnique, Tensors, difference

NAME = "ln_tuning"
PARAMETERS = ("weight", "bias")
_LAYERS = "ln_tuning_layers"


def new_slot(module: str, parameters: Mapping[str, tuple[tuple[int, ...], str]]) -> Slot:
    """A slot on a normalization; `parameters` has of each its shape, and the base's own in `weights.bin`."""
    tensors = []
    for name, (shape, default) in parameters.items():
        key = f"{PREFIX}{module}.{_LAYERS}.{name}"
        tensors.append(SlotTensor(name, key, key, shape, transposed=False, trains=True, neutral=default))
    return Slot(NAME, PARAMETER, module, tuple(tensors))


class LnTuning(PeftTechnique):
    """See the module."""

    name, title, peft_type = NAME, "layer-norm tuning", "LN_TUNING"
    inert = "it stores no normalization"
    suffixes = tuple(f".{_LAYERS}.{name}" for name in PARAMETERS)

    def problem(self, slot: Slot) -> str | None:
        found = {}
        for tensor in slot.tensors:
            sizes = tuple(size for size in tensor.shape if isinstance(size, int))
            if sizes != tensor.shape or tensor.default is None or tensor.name not in PARAMETERS:
                return f"has {tensor.name} {list(tensor.shape)} with the default {tensor.neutral!r}"
            found[tensor.name] = sizes, tensor.default
        return difference(slot, new_slot(slot.module, found)) if found else "has no tensors"

    def check(self, config: Mapping[str, object], tensors: Tensors, origin: str) -> dict[str, float]:
        """
        Raises:
            AdapterError: a bias has no weight beside it.
        """
        del config
        for module in self.modules({key: value for key, value in tensors.items() if self.owns(key)}):
            if f"{PREFIX}{module}{self.suffixes[0]}" not in tensors:
                raise AdapterError(f"{origin}: module {module} has no {self.suffixes[0][1:]}")
        return {}

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        names = [key.removesuffix(end) for end in self.suffixes for key in tensors if key.endswith(end)]
        return tuple(name.removeprefix(PREFIX) for name in dict.fromkeys(names))

    def has_effect(self, adapter: Held) -> bool:
        """What it stores is compared with the base's own, as saved modules are: by `Adapter.has_effect`."""
        del adapter
        return False


TECHNIQUE = LnTuning()
