"""A technique that tests add: a vector that is added to what a linear module makes, `y += shift`.

Here is what real ones have in `edgepeft/techniques/`, and no import of the workstation's; `bias_vector_graph`
has the other half.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from edgepeft import techniques
from edgepeft.slots import LINEAR, PREFIX, ZEROS, Slot, SlotTensor
from edgepeft.techniques.base import Held, PeftTechnique, difference

NAME, SHIFT = "bias_vector", ".shift"


def new_slot(module: str, out_features: int) -> Slot:
    """A slot on a linear module."""
    key = f"{PREFIX}{module}{SHIFT}"
    tensor = SlotTensor("shift", key, key, (out_features,), transposed=False, trains=True, neutral=ZEROS)
    return Slot(NAME, LINEAR, module, (tensor,))


class BiasVector(PeftTechnique):
    """What an adapter's tensors mean."""

    name, title, peft_type = NAME, "bias vector", "BIAS_VECTOR"
    inert = "every shift is zero"
    suffixes = (SHIFT,)

    def problem(self, slot: Slot) -> str | None:
        (size,) = slot.tensors[0].shape if len(slot.tensors) == 1 else ("?",)
        return difference(slot, new_slot(slot.module, size)) if isinstance(size, int) else "has no one vector"

    def has_effect(self, adapter: Held) -> bool:
        return any(bool(value.any()) for key, value in adapter.tensors.items() if self.owns(key))


TECHNIQUE = BiasVector()


@contextmanager
def added() -> Iterator[None]:
    """Have devices know it, as they know what is in `edgepeft/techniques/`."""
    with patch.dict(techniques.MODULES, {NAME: __name__}):
        yield
