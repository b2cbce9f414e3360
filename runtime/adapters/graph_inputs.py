"""Adapters as graph inputs: one, mixtures of several, and batches whose rows have adapters of their own.

What an adapter's tensors are in a slot, and how several go together, the slot's technique says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from edgepeft.adapters import CONFIG_FILE, TENSOR_FILE, Adapter, load_adapter
from edgepeft.bundle.adapter_store import check_has_effect
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import AdapterError, UsageError
from edgepeft.slots import Slot
from edgepeft.techniques import is_in_decoder, lora, of_slot
from edgepeft.techniques.base import FloatArray
from edgepeft.tensor_files import count_values, header_size

from ..memory.room import PARSED, check_room

AdapterSpec = str | Path | Mapping[str, float] | None
"""An adapter of the bundle or a loaded one by name, a PEFT folder by path, a mixture of them with weights, or
none."""


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter as the graphs take it: the adapter's own bytes and no more, since its factors are turned
    once and a swap only binds them.

    Attributes:
        origin: where it came from, for messages.
        inputs: float32 by input name, contiguous: those of every slot that it has something in.
        labels: see `Adapter`.
    """

    origin: str
    inputs: dict[str, FloatArray]
    labels: tuple[str, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.inputs.values())


Weighted = Sequence[tuple[PreparedAdapter, float]]


def prepare(bundle: Bundle, adapter: Adapter | PreparedAdapter) -> PreparedAdapter:
    """An adapter's tensors as the graphs take them; one that is prepared already stays as it is."""
    if isinstance(adapter, PreparedAdapter):
        return adapter
    inputs: dict[str, FloatArray] = {}
    for slot in bundle.manifest.slots:
        inputs.update(of_slot(slot).values(slot, adapter))
    return PreparedAdapter(adapter.origin, inputs, adapter.labels)


def resolve(
    bundle: Bundle,
    spec: AdapterSpec,
    *,
    check_effect: bool = True,
    loaded: Mapping[str, PreparedAdapter] = MappingProxyType({}),
) -> list[tuple[PreparedAdapter, float]]:
    """The adapters that a specification names, each with its weight; those of weight 0 are left out.

    Args:
        bundle: the bundle.
        spec: what is asked for.
        check_effect: refuse an adapter that changes nothing.
        loaded: adapters that are in memory, by name; others are read.

    Raises:
        UsageError: a weight is not a finite number.
        AdapterError: an adapter is missing, does not fit, or has no effect on the output.
    """
    chosen: list[tuple[PreparedAdapter, float]] = []
    for name, weight in weights_of(spec).items():
        if weight == 0:
            continue
        prepared = loaded.get(str(name))
        if prepared is None:
            adapter = find_adapter(bundle, name)
            if check_effect:
                check_effect_of(bundle, adapter)
            prepared = prepare(bundle, adapter)
        chosen.append((prepared, weight))
    return chosen


def weights_of(spec: AdapterSpec) -> dict[str | Path, float]:
    """The weight of each adapter that a specification names.

    Raises:
        UsageError: a weight is not a finite number.
    """
    if spec is None:
        return {}
    weighted: Mapping[Any, Any] = spec if isinstance(spec, Mapping) else {spec: 1.0}
    for name, weight in weighted.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"adapter {name!s}: its weight is {weight!r}, expected a number")
    return {name: float(weight) for name, weight in weighted.items()}


def is_path(name: str | Path) -> bool:
    """Whether a name is that of a folder outside the bundle: anything with a separator in it."""
    return isinstance(name, Path) or "/" in name or "\\" in name


def find_adapter(bundle: Bundle, name: str | Path) -> Adapter:
    """An adapter of the bundle by name, or a PEFT folder elsewhere by path (see `is_path`).

    Raises:
        AdapterError: it is missing, damaged, does not fit the base or was trained on another.
        BudgetError: the memory budget has no room for it.
    """
    folder = Path(name) if is_path(name) else bundle.path / "adapters" / name
    file = folder / TENSOR_FILE
    if file.is_file():
        check_room(PARSED * header_size(file), f"{file}: its header")
        # As float32, and meanwhile as pages of the file or, afterwards, as the graphs take it.
        check_room(2 * 4 * count_values(file), f"{folder}: the adapter")
    if not is_path(name) and name not in bundle.adapter_names() and (Path(name) / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{bundle.path}: has no adapter {name!r}, but a folder of that name is here: write ./{name}"
        )
    if is_path(name):
        adapter = load_adapter(name)
        bundle.check_fit(adapter)
        return adapter
    return bundle.adapter(str(name))


def check_effect_of(bundle: Bundle, adapter: Adapter) -> None:
    """Refuse an adapter from outside that changes nothing; the bundle's own may be untrained starting
    points.

    Raises:
        AdapterError: it has no effect.
    """
    if adapter.origin not in {str(bundle.path / "adapters" / name) for name in bundle.manifest.adapters}:
        check_has_effect(bundle, adapter)


def graph_inputs(
    bundle: Bundle, adapters: Sequence[tuple[Adapter | PreparedAdapter, float]]
) -> dict[str, FloatArray]:
    """Every adapter input of the bundle's graphs, as contiguous float32 arrays.

    A slot that no adapter has anything in gets its neutral values. Arrays of a single adapter are its own,
    not copies.

    Raises:
        AdapterError: what adapters have in a slot cannot be mixed without ambiguity.
    """
    weighted = [(prepare(bundle, adapter), weight) for adapter, weight in adapters]
    inputs: dict[str, FloatArray] = {}
    for slot in bundle.manifest.slots:
        parts = [(adapter.inputs, weight) for adapter, weight in weighted if _is_in(slot, adapter)]
        inputs.update(of_slot(slot).mixed(slot, parts, bundle.read_weight))
    return inputs


def row_inputs(bundle: Bundle, rows: Sequence[Weighted]) -> dict[str, FloatArray]:
    """Every adapter input of the inference graph for a batch whose rows have adapters of their own.

    Args:
        bundle: the bundle.
        rows: the adapters of each row and their weights.

    Raises:
        AdapterError: rows differ in a slot that cannot tell them apart.
    """
    distinct = list({id(adapter): adapter for row in rows for adapter, _ in row}.values())
    weights = np.zeros((len(rows), len(distinct)), np.float32)
    for index, row in enumerate(rows):
        for adapter, weight in row:
            weights[index, next(n for n, other in enumerate(distinct) if other is adapter)] += weight
    inputs: dict[str, FloatArray] = {}
    for slot in bundle.manifest.slots:
        used = [n for n, adapter in enumerate(distinct) if _is_in(slot, adapter)]
        adapters = [distinct[n].inputs for n in used]
        inputs.update(of_slot(slot).rows(slot, adapters, weights[:, used], bundle.read_weight))
    return inputs


def _is_in(slot: Slot, adapter: PreparedAdapter) -> bool:
    return any(name in adapter.inputs for name in slot.inputs)


def is_decoder(manifest: Manifest, role: str) -> bool:
    """Whether a graph is one of the decoder's, with LoRA inputs or without."""
    decoder = manifest.decoder
    return decoder is not None and any(role in pair for pair in decoder.pairs)


def inputs_taken(manifest: Manifest, role: str, inputs: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What `graph_inputs` gives, as the graph of this role takes it."""
    if not is_decoder(manifest, role):
        return inputs
    assert manifest.decoder is not None
    others = {name: inputs[name] for slot in manifest.slots if is_in_decoder(slot) for name in slot.inputs}
    return others if manifest.decoder.adapted_twin(role) else group_inputs(manifest, inputs) | others


def group_inputs(manifest: Manifest, inputs: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What `graph_inputs` gives, as the decoder graph takes it: the slots of a group side by side, `B` times
    its scaling.

    The `A` factors in `inputs` become views of the new arrays, so that they are not held twice. Those stand
    in one piece, in the order in which a token reads them: it is read faster than many.
    """
    assert manifest.decoder is not None
    shapes = _group_shapes(manifest, inputs)
    slots = {slot.module: slot for slot in manifest.packed_slots}
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(np.zeros(sum(map(math.prod, shapes)), np.float32), ends)[:-1]  # none without groups
    factors = iter([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
    grouped: dict[str, FloatArray] = {}
    for group in manifest.decoder.groups:
        members = [slots[placed.module] for placed in group.slots]
        lora_a, lora_b = next(factors), next(factors)
        np.concatenate([inputs[slot.input(lora.A)] for slot in members], axis=1, out=lora_a)
        first = 0
        for slot, placed in zip(members, group.slots, strict=True):
            scaled = inputs[slot.input(lora.SCALING)][:, None] * inputs[slot.input(lora.B)]
            ranks = slice(first, first + len(scaled))
            lora_b[ranks, placed.first : placed.first + scaled.shape[1]] = scaled
            inputs[slot.input(lora.A)] = lora_a[:, ranks]
            first = ranks.stop
        grouped |= {group.a_input: lora_a, group.b_input: lora_b}
    return grouped


def group_bytes(manifest: Manifest, inputs: Mapping[str, FloatArray]) -> int:
    """Bytes of what `group_inputs` gives for these inputs."""
    return 4 * sum(math.prod(shape) for shape in _group_shapes(manifest, inputs))


def _group_shapes(manifest: Manifest, inputs: Mapping[str, FloatArray]) -> list[tuple[int, int]]:
    """The shapes of `A` and `B` of every group, one after the other."""
    assert manifest.decoder is not None
    slots = {slot.module: slot for slot in manifest.packed_slots}
    shapes = []
    for group in manifest.decoder.groups:
        rank = sum(of_slot(slot).size(slot, inputs) for slot in (slots[item.module] for item in group.slots))
        shapes += [(group.in_features, rank), (rank, group.out_features)]
    return shapes


def to_peft_layout(bundle: Bundle, values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Copies of tensors in the graphs' layout, by input name, as PEFT's file has them, by its keys."""
    tensors: dict[str, FloatArray] = {}
    for slot in bundle.manifest.slots:
        tensors.update(of_slot(slot).write(slot, values))
    return tensors
