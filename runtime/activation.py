"""Adapters as graph inputs: transposed factors, scaling vectors, saved modules, and mixtures of several
adapters.

A mixture is exact: the factors stand side by side along the rank axis and each adapter's weight goes into its
scaling. A module of `modules_to_save` replaces a parameter instead of adding to it, so there a mixture is
defined only where it is unambiguous: one adapter that carries it is used whole; several are averaged if they
are equal or if their weights sum to 1; anything else is refused.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgepeft.adapters import Adapter, fit, load_adapter
from edgepeft.bundle.manifest import LoraSlot, Manifest, SavedModule
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import AdapterError, UsageError

FloatArray = npt.NDArray[np.float32]
AdapterSpec = str | Path | Mapping[str, float] | None
"""An adapter of the bundle by name, a PEFT folder by path, a mixture of names with weights, or none."""


def resolve(bundle: Bundle, spec: AdapterSpec, *, check_effect: bool = True) -> list[tuple[Adapter, float]]:
    """The adapters that a specification names, each with its weight; those of weight 0 are left out.

    Raises:
        UsageError: a weight is not a finite number.
        AdapterError: an adapter is missing, does not fit, or has no effect on the output.
    """
    if spec is None:
        return []
    weighted = spec if isinstance(spec, Mapping) else {spec: 1.0}
    chosen: list[tuple[Adapter, float]] = []
    for name, weight in weighted.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"adapter {name!s}: its weight is {weight!r}, expected a number")
        if weight != 0:
            chosen.append((find_adapter(bundle, name), float(weight)))
    for adapter, _ in chosen if check_effect else ():
        _check_effect(bundle, adapter)
    return chosen


def find_adapter(bundle: Bundle, name: str | Path) -> Adapter:
    """An adapter of the bundle by name, or a PEFT folder elsewhere by path (anything with a separator in it).

    Raises:
        AdapterError: it is missing, damaged or does not fit the base.
    """
    if isinstance(name, Path) or "/" in name or "\\" in name:
        adapter = load_adapter(name)
        fit(adapter, bundle.manifest.lora_slots, bundle.manifest.saved_modules)
        return adapter
    return bundle.adapter(name)


def _check_effect(bundle: Bundle, adapter: Adapter) -> None:
    """Refuse an adapter from outside that changes nothing; the bundle's own may be untrained starting
    points."""
    if adapter.origin in {str(bundle.path / "adapters" / name) for name in bundle.manifest.adapters}:
        return
    defaults = {
        saved.input: bundle.read_weight(saved.default)
        for saved in bundle.manifest.saved_modules
        if saved.input in adapter.tensors
    }
    if not adapter.has_effect(defaults):
        raise AdapterError(
            f"{adapter.origin}: has no effect: every lora_B is zero and no saved module differs from the "
            "base's: train it first"
        )


def graph_inputs(bundle: Bundle, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, FloatArray]:
    """Every adapter input of the bundle's graphs, as contiguous float32 arrays.

    Slots get `A` `[in_features, r]`, `B` `[r, out_features]` and scaling `[r]`, where r is the sum of the
    adapters' ranks there (0 without any); saved modules get a whole parameter.

    Raises:
        AdapterError: saved modules cannot be mixed without ambiguity.
    """
    inputs: dict[str, FloatArray] = {}
    for slot in bundle.manifest.lora_slots:
        inputs.update(slot_inputs(slot, adapters))
    for saved in bundle.manifest.saved_modules:
        inputs[saved.input] = _saved_input(bundle, saved, adapters)
    return inputs


def slot_inputs(slot: LoraSlot, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, FloatArray]:
    """The three inputs of one slot."""
    a_parts = [np.empty((slot.in_features, 0), np.float32)]
    b_parts = [np.empty((0, slot.out_features), np.float32)]
    scalings = [np.empty(0, np.float32)]
    for adapter, weight in adapters:
        rank = adapter.rank(slot.module)
        if rank:
            a_parts.append(adapter.tensors[slot.a_input].T)
            b_parts.append(adapter.tensors[slot.b_input].T)
            scalings.append(np.full(rank, weight * adapter.scaling(slot.module), np.float32))
    return {
        slot.a_input: np.ascontiguousarray(np.concatenate(a_parts, axis=1)),
        slot.b_input: np.ascontiguousarray(np.concatenate(b_parts, axis=0)),
        slot.scaling_input: np.concatenate(scalings),
    }


def is_decoder(manifest: Manifest, role: str) -> bool:
    """Whether a graph takes adapters as `group_inputs` gives them."""
    decoder = manifest.decoder
    return decoder is not None and role in (decoder.graph, decoder.int8_graph)


def group_inputs(manifest: Manifest, inputs: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What `graph_inputs` gives, as the decoder graph takes it: the slots of a group side by side, `B` times
    its scaling.

    The `A` factors in `inputs` become views of the new arrays, so that they are not held twice.
    """
    assert manifest.decoder is not None
    slots = {slot.module: slot for slot in manifest.lora_slots}
    grouped: dict[str, FloatArray] = {}
    for group in manifest.decoder.groups:
        members = [slots[placed.module] for placed in group.slots]
        lora_a = np.concatenate([inputs[slot.a_input] for slot in members], axis=1)
        lora_b = np.zeros((lora_a.shape[1], group.out_features), np.float32)
        first = 0
        for slot, placed in zip(members, group.slots, strict=True):
            scaled = inputs[slot.scaling_input][:, None] * inputs[slot.b_input]
            ranks = slice(first, first + len(scaled))
            lora_b[ranks, placed.first : placed.first + slot.out_features] = scaled
            inputs[slot.a_input] = lora_a[:, ranks]
            first = ranks.stop
        grouped |= {group.a_input: lora_a, group.b_input: lora_b}
    return grouped


def _saved_input(bundle: Bundle, saved: SavedModule, adapters: Sequence[tuple[Adapter, float]]) -> FloatArray:
    carriers = [
        (adapter.tensors[saved.input], weight)
        for adapter, weight in adapters
        if saved.input in adapter.tensors
    ]
    if not carriers:
        return bundle.read_weight(saved.default)
    first = carriers[0][0]
    if all(np.array_equal(first, value) for value, _ in carriers[1:]):
        return np.ascontiguousarray(first)
    total = sum(weight for _, weight in carriers)
    if abs(total - 1) > 1e-6:
        raise AdapterError(
            f"module {saved.module} is replaced by {len(carriers)} of the mixed adapters, whose weights sum "
            f"to {total:g}: give these weights that sum to 1, or mix only one adapter that carries it"
        )
    mixed = sum((weight * value for value, weight in carriers), np.zeros(saved.shape, np.float32))
    return np.ascontiguousarray(mixed, dtype=np.float32)


def to_peft_layout(bundle: Bundle, values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Tensors in the graphs' layout, keyed by input name, as PEFT has them: both LoRA factors transposed."""
    transposed = {name for slot in bundle.manifest.lora_slots for name in (slot.a_input, slot.b_input)}
    return {
        name: np.ascontiguousarray(value.T) if name in transposed else value.copy()
        for name, value in values.items()
    }
