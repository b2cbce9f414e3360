"""Batches with the virtual tokens of adapters in front of their texts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import UsageError
from edgepeft.slots import Slot
from edgepeft.techniques import of_slot
from edgepeft.techniques.base import FloatArray
from edgepeft.virtual_tokens import FIRST_ID, RANGE, Ids, VirtualTokens, count_virtual, token_ids

from ..inputs import IGNORED_LABEL, Array
from .graph_inputs import Weighted

_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "labels")


class Virtual(NamedTuple):
    """The virtual tokens in front of a row, and whether the last of them says what comes next."""

    ids: Ids
    predicts: bool = True


NONE = Virtual(np.zeros(0, np.int64))


def virtual_slots(manifest: Manifest) -> list[tuple[Slot, VirtualTokens]]:
    """The slots that virtual tokens stand for."""
    found = [(slot, of_slot(slot)) for slot in manifest.slots]
    return [(slot, technique) for slot, technique in found if isinstance(technique, VirtualTokens)]


def ids_end(manifest: Manifest) -> int:
    """The id behind the last that a token can have, virtual ones included."""
    ends = [int(slot.settings[FIRST_ID]) + RANGE for slot, _ in virtual_slots(manifest)]
    return max(ends, default=manifest.model.vocab_size)


def of_rows(manifest: Manifest, rows: Sequence[Weighted]) -> list[Virtual]:
    """What stands in front of each row, whose adapters these are; see `graph_inputs.row_inputs`."""
    distinct = list({id(adapter): adapter for row in rows for adapter, _ in row}.values())
    found = [NONE] * len(rows)
    for slot, technique in virtual_slots(manifest):
        own: dict[int, Virtual] = {}
        first = 0
        for adapter in distinct:
            if slot.inputs[0] in adapter.inputs:
                count = technique.size(slot, adapter.inputs)
                own[id(adapter)] = Virtual(token_ids(slot, first, count), technique.predicts)
                first += count
        for index, row in enumerate(rows):
            found[index] = next((own[id(item)] for item, _ in row if id(item) in own), found[index])
    return found


def of_adapter(manifest: Manifest, adapter: Adapter) -> Virtual | None:
    """What stands in front of every text with one adapter for all; None where it has no virtual tokens."""
    count = count_virtual(adapter)
    slots = [item for item in virtual_slots(manifest) if item[1] is adapter.technique]
    return Virtual(token_ids(slots[0][0], 0, count), slots[0][1].predicts) if count else None


def in_front(manifest: Manifest, batch: Mapping[str, Array], virtual: Sequence[Virtual]) -> dict[str, Array]:
    """The batch with each row's virtual tokens in front of its others, padded on the right to one length.

    Args:
        manifest: the bundle's manifest.
        batch: arrays as the graphs take them; those `[batch, sequence]` are lengthened: masks by 1, token
            types by 0, labels by -100.
        virtual: of every row.

    Raises:
        UsageError: that is more than the model takes.
    """
    most, length = _most(virtual), batch["input_ids"].shape[1]
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
        if name == "token_type_ids" and manifest.task == "feature-extraction":
            array = np.zeros_like(array)  # which PEFT ignores there
        padding = IGNORED_LABEL if name == "labels" else 0
        rows = np.full((len(array), most + length), padding, array.dtype)
        for row, values, (ids, predicts) in zip(rows, array, virtual, strict=True):
            row[: len(ids)] = {"input_ids": ids, "attention_mask": 1}.get(name, padding)
            row[len(ids) : len(ids) + length] = values
            if name == "labels" and not predicts:
                row[len(ids)] = padding
        found[name] = rows
    return found


def without_front(
    manifest: Manifest, name: str, output: FloatArray, virtual: Sequence[Virtual]
) -> FloatArray:
    """Of an output of the inference graph what is of the rows' own tokens, where it has anything for each."""
    spec = next(item for item in manifest.graphs["inference"].outputs if item.name == name)
    if spec.shape[1:2] != ("sequence",):
        return output
    length = output.shape[1] - _most(virtual)
    starts = [len(own.ids) for own in virtual]
    return np.stack([row[start : start + length] for row, start in zip(output, starts, strict=True)])


def _most(virtual: Sequence[Virtual]) -> int:
    return max(len(own.ids) for own in virtual)
