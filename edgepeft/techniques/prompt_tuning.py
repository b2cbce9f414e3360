"""Prompt tuning: embeddings of virtual tokens, which stand in front of every text.

    hidden = where(id is virtual, prompt[id - first_id], embedding[id])

Source: arXiv 2104.08691; `peft.tuners.prompt_tuning`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..slots import EMBEDDING, EMPTY, SIZE, Slot, SlotTensor
from ..virtual_tokens import FIRST_ID, KEY, VirtualTokens
from .base import FloatArray, ReadWeight, Tensors, difference

NAME = "prompt_tuning"
PROMPT = "prompt"
MODULE = "word_embeddings"
"""What PEFT calls the embedding of tokens, whatever its name in the model."""
DEVIATION = "deviation"
"""A slot's setting: the standard deviation of the base's embeddings, as which a fresh prompt begins."""


def new_slot(first_id: int, width: int, deviation: float) -> Slot:
    """A slot on the embedding of tokens, `[vocabulary, width]`."""
    prompt = SlotTensor(PROMPT, KEY, KEY, (SIZE, width), transposed=False, trains=True, neutral=EMPTY)
    settings: dict[str, bool | int | float | str] = {FIRST_ID: first_id, DEVIATION: deviation}
    return Slot(NAME, EMBEDDING, MODULE, (prompt,), settings, activation_axes=3)


class PromptTuning(VirtualTokens):
    """See the module."""

    name, title, peft_type = NAME, "prompt tuning", "PROMPT_TUNING"
    inert = "it stores no prompt"
    suffixes = (KEY,)
    place = 0

    def owns(self, key: str) -> bool:
        return key == KEY

    def modules(self, tensors: Tensors) -> tuple[str, ...]:
        return (MODULE,) if KEY in tensors else ()

    def problem(self, slot: Slot) -> str | None:
        first_id, deviation = slot.settings.get(FIRST_ID), slot.settings.get(DEVIATION)
        if type(first_id) is not int or first_id < 1 or type(deviation) is not float or not deviation >= 0:
            return f"has the settings {slot.settings}"
        width = slot.tensors[0].shape[-1] if slot.tensors else None
        if not isinstance(width, int) or width < 1:
            return f"has tensors of shapes {[list(tensor.shape) for tensor in slot.tensors]}"
        return difference(slot, new_slot(first_id, width, deviation))

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """Normal, as large as the base's embeddings are: from PEFT's own deviation of 1 little is learned."""
        del read_weight
        shape = size, int(slot.tensor(PROMPT).shape[1])
        deviation = float(slot.settings[DEVIATION])
        return {KEY: (deviation * rng.standard_normal(shape)).astype(np.float32)}

    def config(self, size: int, slots: Sequence[Slot]) -> dict[str, Any]:
        return super().config(size, slots) | {"prompt_tuning_init": "RANDOM"}


TECHNIQUE = PromptTuning()
