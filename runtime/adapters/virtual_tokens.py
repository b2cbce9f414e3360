"""Batches with the virtual tokens of adapters in front of their texts."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import UsageError
from edgepeft.techniques import of_slot
from edgepeft.techniques.base import FloatArray
from edgepeft.virtual_tokens import FIRST_ID, RANGE, Ids, VirtualTokens, count_virtual, token_ids

from ..inputs import IGNORED_LABEL, Array
from .graph_inputs import Weighted

_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "labels")
NONE: Ids = np.zeros(0, np.int64)


def has_virtual_tokens(manifest: Manifest) -> bool:
    """Whether an adapter of the bundle can have any."""
    return any(isinstance(of_slot(slot), VirtualTokens) for slot in manifest.slots)


def ids_end(manifest: Manifest) -> int:
    """The id behind the last that a token can have, virtual ones included."""
    ends = [
        int(slot.settings[FIRST_ID]) + RANGE
        for slot in manifest.slots
        if isinstance(of_slot(slot), VirtualTokens)
    ]
    return max(ends, default=manifest.model.vocab_size)


def ids_of_rows(manifest: Manifest, rows: Sequence[Weighted]) -> list[Ids]:
    """The virtual tokens in front of each row, whose adapters these are; see `graph_inputs.row_inputs`."""
    distinct = list({id(adapter): adapter for row in rows for adapter, _ in row}.values())
    found = [NONE] * len(rows)
    for slot in manifest.slots:
        technique = of_slot(slot)
        if not isinstance(technique, VirtualTokens):
            continue
        own: dict[int, Ids] = {}
        first = 0
        for adapter in distinct:
            if slot.inputs[0] in adapter.inputs:
                count = technique.size(slot, adapter.inputs)
                own[id(adapter)] = token_ids(slot, first, count)
                first += count
        for index, row in enumerate(rows):
            found[index] = next((own[id(item)] for item, _ in row if id(item) in own), found[index])
    return found


def ids_of(manifest: Manifest, adapter: Adapter) -> Ids | None:
    """The virtual tokens in front of every text with one adapter for all; None where it has none."""
    technique = adapter.technique
    if not isinstance(technique, VirtualTokens):
        return None
    slot = next(slot for slot in manifest.slots if slot.technique == technique.name)
    return token_ids(slot, 0, count_virtual(adapter))


def in_front(manifest: Manifest, batch: Mapping[str, Array], ids: Sequence[Ids]) -> dict[str, Array]:
    """The batch with each row's virtual tokens in front of its others, padded on the right to one length.

    Args:
        manifest: the bundle's manifest.
        batch: arrays as the graphs take them; those `[batch, sequence]` are lengthened: masks by 1, token
            types by 0, labels by -100.
        ids: of every row.

    Raises:
        UsageError: that is more than the model takes.
    """
    most, length = max(map(len, ids)), batch["input_ids"].shape[1]
    if most + length > manifest.model.max_length:
        raise UsageError(
            f"input 'input_ids': has {length} tokens a row and {most} virtual tokens in front of them, the "
            f"model takes at most {manifest.model.max_length}"
        )
    found: dict[str, Array] = {}
    for name, array in batch.items():
        if array.shape[1:2] != (length,) or name not in _BY_TOKEN:
            found[name] = array
            continue
        padding = IGNORED_LABEL if name == "labels" else 0
        rows = np.full((len(array), most + length), padding, array.dtype)
        for row, values, own in zip(rows, array, ids, strict=True):
            row[: len(own)] = {"input_ids": own, "attention_mask": 1}.get(name, padding)
            row[len(own) : len(own) + length] = values
        found[name] = rows
    return found


def without_front(manifest: Manifest, name: str, output: FloatArray, ids: Sequence[Ids]) -> FloatArray:
    """Of an output of the inference graph what is of the rows' own tokens, where it has anything for each."""
    spec = next(item for item in manifest.graphs["inference"].outputs if item.name == name)
    if spec.shape[1:2] != ("sequence",):
        return output
    length = output.shape[1] - max(map(len, ids))
    return np.stack([row[len(own) : len(own) + length] for row, own in zip(output, ids, strict=True)])
