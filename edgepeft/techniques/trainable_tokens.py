"""Trainable tokens: rows of the embedding of tokens that are replaced, and of a layer that is tied to it.

    y = rows[i] where id = tokens[i], else W[id]          tied: logits[tokens[i]] = h · rows[i]

In the graphs the rows are `[tokens, width]`, as in PEFT's file, and their tokens float32 `[tokens]`, of which
there may be any number: none leaves the embedding as it is. A LoRA may have them, too.

Source: `peft.tuners.trainable_tokens`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..errors import AdapterError
from ..slots import EMBEDDING, EMPTY, PREFIX, SIZE, TRAINABLE_TOKENS, Slot, SlotTensor
from ..token_rows import (
    OPTION,
    ROWS,
    check_rows,
    check_token_indices,
    owns_rows,
    rows_from_file,
    rows_to_file,
    token_indices,
)
from .base import FloatArray, Held, PeftTechnique, ReadWeight, Tensors, difference

TOKEN_ROWS, TOKENS = "rows", "tokens"


def new_slot(module: str, width: int) -> Slot:
    """A slot on the embedding of tokens."""
    key = f"{PREFIX}{module}"
    return Slot(
        technique=TRAINABLE_TOKENS,
        site=EMBEDDING,
        module=module,
        tensors=(
            SlotTensor(
                TOKEN_ROWS,
                key + ROWS,
                key + ROWS,
                (SIZE, width),
                transposed=False,
                trains=True,
                neutral=EMPTY,
            ),
            SlotTensor(TOKENS, f"{key}.tokens", None, (SIZE,), transposed=False, trains=False, neutral=EMPTY),
        ),
    )


def replaced_tokens(slot: Slot, values: Tensors) -> list[int]:
    """The tokens whose rows are replaced by the values that a slot is fed."""
    return [int(token) for token in values[slot.input(TOKENS)]]


class TrainableTokens(PeftTechnique):
    """See the module."""

    name, title, peft_type = TRAINABLE_TOKENS, "trainable tokens", "TRAINABLE_TOKENS"
    inert = "it replaces no rows"
    apart = "has one embedding for all rows of a batch, so these cannot differ in it"
    saves_modules = False
    suffixes: ClassVar[tuple[str, ...]] = (ROWS,)

    def problem(self, slot: Slot) -> str | None:
        width = slot.tensors[0].shape[-1] if slot.tensors and slot.tensors[0].shape else None
        if not isinstance(width, int) or width < 1:
            return f"has tensors of shapes {[list(tensor.shape) for tensor in slot.tensors]}"
        return difference(slot, new_slot(slot.module, width))

    def values(self, slot: Slot, adapter: Held) -> dict[str, FloatArray]:
        """Also of adapters of another technique that have such rows."""
        found = super().values(slot, adapter)
        tokens = token_indices(adapter.config)
        return found and {**found, slot.input(TOKENS): np.array(tokens, np.float32)}

    def fresh(
        self, slot: Slot, size: int, rng: np.random.Generator, read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """
        Raises:
            AdapterError: always, since which tokens are to train is not for the device to choose.
        """
        del size, rng, read_weight
        raise AdapterError(
            f"module {slot.module}: a fresh adapter of {self.title} has to say which they are: make it with "
            "PEFT's TrainableTokensConfig(token_indices=[…]) and start from that"
        )

    def config_of(self, values: Sequence[tuple[Slot, Tensors]], origin: str) -> dict[str, Any]:
        del origin
        found: dict[str, Any] = {"init_weights": True, OPTION: []}
        for slot, tensors in values:  # one; PEFT warns of a list with what another layer is tied to
            found |= {OPTION: replaced_tokens(slot, tensors), "target_modules": slot.module}
        return found

    def mixed(
        self, slot: Slot, weighted: Sequence[tuple[Tensors, float]], read_weight: ReadWeight
    ) -> dict[str, FloatArray]:
        """Those of all adapters, whose tokens differ, as in PEFT."""
        tokens = [token for values, _ in weighted for token in values[slot.input(TOKENS)].tolist()]
        if len(weighted) < 2 or len(set(tokens)) < len(tokens) or any(weight != 1 for _, weight in weighted):
            return super().mixed(slot, weighted, read_weight)
        return {name: np.concatenate([values[name] for values, _ in weighted]) for name in slot.inputs}

    def owns(self, key: str) -> bool:
        return owns_rows(key)

    def rank(self, tensors: Tensors, module: str) -> int:
        rows = tensors.get(f"{PREFIX}{module}{ROWS}")
        return 0 if rows is None else len(rows)

    def check_config(self, config: Mapping[str, Any], origin: str) -> None:
        check_token_indices(config, origin)

    def check(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, float]:
        check_rows(config, tensors, origin)
        return {}

    def from_file(self, config: Mapping[str, Any], tensors: Tensors, origin: str) -> dict[str, FloatArray]:
        return rows_from_file(config, tensors, origin)

    def to_file(self, tensors: Tensors) -> dict[str, FloatArray]:
        return rows_to_file(tensors, of_lora=False)

    def fit(self, slot: Slot, adapter: Held) -> None:
        width, expected = adapter.tensors[slot.input(TOKEN_ROWS)].shape[1], slot.tensor(TOKEN_ROWS).shape[1]
        if width != expected:
            raise AdapterError(
                f"{adapter.origin}: module {slot.module}: its rows are {width} wide in the adapter, "
                f"{expected} in this bundle: the adapter was made for another base"
            )

    def has_effect(self, adapter: Held) -> bool:
        """Where there are any: what the base has in their place is not known here."""
        return any(key.endswith(ROWS) and value.size for key, value in adapter.tensors.items())


TECHNIQUE = TrainableTokens()
