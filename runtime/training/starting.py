"""What an update starts from: an adapter of the bundle or a fresh one, and which of its tensors may train."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import UsageError
from edgepeft.slots import WHOLE
from edgepeft.techniques import of_slot, peft_slots
from edgepeft.techniques.base import FloatArray, PeftTechnique

from ..adapters.fresh import fresh_slots, fresh_technique, peft_config
from ..adapters.graph_inputs import find_adapter
from ..memory.room import check_room
from .options import DEFAULT_RANK, TrainingOptions


def starting_adapter(bundle: Bundle, options: TrainingOptions) -> Adapter:
    """The adapter to train; whatever it was trained on before, from now on this bundle's base is its base.

    Raises:
        UsageError: the bundle has none and no rank for a fresh one is given.
        AdapterError: it is damaged, does not fit or was trained on another base.
    """
    if options.starts_fresh:
        rank = DEFAULT_RANK if options.rank is None else options.rank
        return fresh_adapter(bundle, rank, options.seed, options.method)
    names = bundle.manifest.adapters
    if options.adapter is None and not names:
        raise UsageError("the bundle has no adapter to start from: start a fresh one with --rank 8")
    found = find_adapter(bundle, options.adapter if options.adapter is not None else names[0])
    return dataclasses.replace(found, base=bundle.manifest.base)


def with_labels(bundle: Bundle, adapter: Adapter, added: Sequence[str]) -> Adapter:
    """The adapter with a row of zeros in its head for each label that is added.

    Raises:
        UsageError: a label is there already, or is no name.
    """
    manifest = bundle.manifest
    labels = adapter.labels or manifest.model.labels
    for label in added:
        if not isinstance(label, str) or not label or label in labels or list(added).count(label) > 1:
            raise UsageError(f"label {label!r} cannot be added: there are {', '.join(labels)}")
    head = manifest.linear_head
    assert head is not None
    tensors = dict(adapter.tensors)
    for slot in manifest.slots_of(WHOLE):
        (key,) = slot.inputs
        if key in head.inputs:
            present = tensors.get(key)
            present = of_slot(slot).neutral(slot, bundle.read_weight)[key] if present is None else present
            rows = np.zeros((len(added), *present.shape[1:]), np.float32)
            tensors[key] = np.concatenate([present, rows])
    return dataclasses.replace(adapter, tensors=tensors, labels=(*labels, *added))


def fresh_adapter(bundle: Bundle, rank: int, seed: int, method: str | None = None) -> Adapter:
    """An adapter as PEFT initializes it, on every slot of `method` (None: see `fresh_technique`), and the
    base's own saved modules; a LoRA with alpha = 2 r. Where a method has no rank, none is used.

    Raises:
        UsageError: the bundle has no slots, or none of the method.
        BudgetError: the memory budget has no room for it.
    """
    manifest = bundle.manifest
    if not manifest.slots:
        raise UsageError("the bundle has no slots for an adapter: export it with --rank and --targets")
    technique = fresh_technique(manifest, method)
    slots = fresh_slots(manifest, technique)
    first = technique.first_size(rank)
    # What no file has of a slot counts too: VeRA's pair of matrices.
    values = sum(math.prod(tensor.sized(first)) for slot in slots for tensor in slot.tensors)
    check_room(2 * 4 * values, f"a fresh adapter of rank {rank}")  # and once more as the graphs take it
    generator = np.random.default_rng([seed, rank])
    tensors: dict[str, FloatArray] = {}
    for slot in slots:
        own = of_slot(slot)
        if isinstance(own, PeftTechnique):
            tensors.update(own.fresh(slot, rank, generator, bundle.read_weight))
        else:
            tensors.update(own.write(slot, own.neutral(slot, bundle.read_weight)))
    return Adapter(
        config=peft_config(manifest, technique, slots)
        | technique.fresh_config(rank, [slot for slot in slots if slot.technique == technique.name]),
        tensors=tensors,
        origin=f"a fresh adapter of rank {rank}",
        base=manifest.base,
    )


def trained_names(manifest: Manifest, adapter: Adapter, options: TrainingOptions) -> list[str]:
    """Graph inputs that train: those the policy allows, the adapter has and the caller chose.

    Raises:
        UsageError: none is left, or the bundle has not so many blocks.
    """
    saved = {name for slot in manifest.slots_of(WHOLE) for name in slot.inputs}
    head = manifest.linear_head
    closed_form = saved & ({head.weight, head.bias} if head is not None else set())
    chosen = {
        "all": set(manifest.adapter_inputs),
        "modules_to_save": saved,
        "head": closed_form,
    }
    for slot, technique in peft_slots(manifest.slots):
        for part, tensors in {
            technique.name: [item.name for item in slot.tensors],
            **technique.parts,
        }.items():
            chosen.setdefault(part, set()).update(map(slot.input, tensors))
    names = [
        name
        for name in manifest.policy.trainable
        if name in adapter.tensors and name in chosen.get(options.trainable, ())
    ]
    if options.top_blocks is not None:
        kept = saved | _top_blocks(manifest, set(names), options.top_blocks)
        names = [name for name in names if name in kept]
    if not names:
        raise UsageError(
            f"nothing to train: with trainable={options.trainable!r} none of the adapter's "
            f"{len(adapter.tensors)} tensors is among the {len(manifest.policy.trainable)} that the bundle's "
            "policy lets train"
        )
    return names


def _top_blocks(manifest: Manifest, names: set[str], count: int) -> set[str]:
    """Those of `names` that belong to the topmost `count` blocks: stages that repeat and have any of them.

    A model whose layers alternate between kinds repeats one layer of each: that is one block.
    """
    if manifest.partition is None:
        raise UsageError(
            f"top_blocks is {count}, but the bundle has no stages to tell blocks by: leave it out, or choose "
            "what trains by the adapter's target modules"
        )
    stages = manifest.partition.stages
    uses = Counter(stage.forward for stage in stages)
    of_blocks = [names & set(stage.adapter.values()) for stage in stages if uses[stage.forward] > 1]
    of_blocks = [found for found in of_blocks if found]
    if count > len(of_blocks):
        raise UsageError(f"top_blocks is {count}, the model has {len(of_blocks)} blocks with what may train")
    return set().union(*of_blocks[-count:])
