"""Adapters as graph inputs: transposed factors, scaling vectors, saved modules, mixtures of several adapters,
and batches whose rows have adapters of their own.

A mixture is exact: the factors stand side by side along the rank axis and each adapter's weight goes into its
scaling. A module of `modules_to_save` replaces a parameter instead of adding to it, so there a mixture is
defined only where it is unambiguous: one adapter that carries it is used whole; several are averaged if they
are equal or if their weights sum to 1; anything else is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.adapters import CONFIG_FILE, TENSOR_FILE, Adapter, load_adapter
from edgepeft.bundle.adapter_store import check_has_effect
from edgepeft.bundle.manifest import LoraSlot, Manifest, SavedModule
from edgepeft.bundle.reader import Bundle
from edgepeft.errors import AdapterError, UsageError
from edgepeft.tensor_files import count_values, header_size

from ..memory.room import PARSED, check_room

FloatArray = npt.NDArray[np.float32]
AdapterSpec = str | Path | Mapping[str, float] | None
"""An adapter of the bundle or a loaded one by name, a PEFT folder by path, a mixture of them with weights, or
none."""


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter as the graphs take it: the adapter's own bytes and no more, since its factors are turned
    once and a swap only binds them.

    Attributes:
        origin: where it came from, for messages.
        inputs: float32 by input name, contiguous: `A` `[in_features, r]`, `B` `[r, out_features]` and scaling
            `[r]` of every slot that it has, and whole parameters of its saved modules.
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
    inputs = {key: np.ascontiguousarray(adapter.tensors[key]) for key in adapter.saved_keys}
    for slot in bundle.manifest.lora_slots:
        rank = adapter.rank(slot.module)
        if rank:
            inputs[slot.a_input] = np.ascontiguousarray(adapter.tensors[slot.a_input].T)
            inputs[slot.b_input] = np.ascontiguousarray(adapter.tensors[slot.b_input].T)
            inputs[slot.scaling_input] = np.full(rank, adapter.scaling(slot.module), np.float32)
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

    Slots get `A` `[in_features, r]`, `B` `[r, out_features]` and scaling `[r]`, where r is the sum of the
    adapters' ranks there (0 without any); saved modules get a whole parameter. Arrays of a single adapter are
    its own, not copies.

    Raises:
        AdapterError: saved modules cannot be mixed without ambiguity.
    """
    weighted = [(prepare(bundle, adapter), weight) for adapter, weight in adapters]
    inputs: dict[str, FloatArray] = {}
    for slot in bundle.manifest.lora_slots:
        parts = [(adapter, weight) for adapter, weight in weighted if slot.a_input in adapter.inputs]
        inputs.update(_factors(slot, [adapter for adapter, _ in parts]))
        scalings = [_times(adapter.inputs[slot.scaling_input], weight) for adapter, weight in parts]
        inputs[slot.scaling_input] = _joined(scalings, 0, (0,))
    for saved in bundle.manifest.saved_modules:
        inputs[saved.input] = _saved_input(bundle, saved, weighted)
    return inputs


def row_inputs(bundle: Bundle, rows: Sequence[Weighted]) -> dict[str, FloatArray]:
    """Every adapter input of the inference graph for a batch whose rows have adapters of their own.

    The factors of all the adapters stand side by side once; scaling is `[batch, 1, …, r]`, as many axes as
    the slot's activations have, and zero where the rank belongs to an adapter that is not the row's.

    Args:
        bundle: the bundle.
        rows: the adapters of each row and their weights.

    Raises:
        AdapterError: a row would need another saved module than another row, or a slot cannot tell the rows
            apart.
    """
    distinct = list({id(adapter): adapter for row in rows for adapter, _ in row}.values())
    weights = np.zeros((len(rows), len(distinct)), np.float32)
    for index, row in enumerate(rows):
        for adapter, weight in row:
            weights[index, next(n for n, other in enumerate(distinct) if other is adapter)] += weight
    inputs: dict[str, FloatArray] = {}
    for slot in bundle.manifest.lora_slots:
        used = [n for n, adapter in enumerate(distinct) if slot.a_input in adapter.inputs]
        inputs.update(_factors(slot, [distinct[n] for n in used]))
        if used and not slot.activation_axes:
            raise AdapterError(
                f"module {slot.module}: its activations mix the rows of a batch, so rows cannot have "
                "adapters of their own: run them one adapter at a time"
            )
        scalings = [weights[:, n, None] * distinct[n].inputs[slot.scaling_input] for n in used]
        scaling = _joined(scalings, 1, (0,))
        between = (1,) * (slot.activation_axes - 2)
        inputs[slot.scaling_input] = scaling.reshape(len(rows), *between, -1) if used else scaling
    for saved in bundle.manifest.saved_modules:
        values = [_saved_input(bundle, saved, row) for row in _distinct_rows(rows)]
        if any(not np.array_equal(values[0], value) for value in values[1:]):
            raise AdapterError(
                f"module {saved.module} is replaced whole by an adapter (modules_to_save), so the rows of a "
                "batch cannot differ in it: run the adapters that differ there one at a time"
            )
        inputs[saved.input] = values[0]
    return inputs


def _distinct_rows(rows: Sequence[Weighted]) -> list[Weighted]:
    return list({tuple((id(adapter), weight) for adapter, weight in row): row for row in rows}.values())


def _factors(slot: LoraSlot, adapters: Sequence[PreparedAdapter]) -> dict[str, FloatArray]:
    """`A` and `B` of some adapters side by side along the rank."""
    return {
        slot.a_input: _joined([item.inputs[slot.a_input] for item in adapters], 1, (slot.in_features, 0)),
        slot.b_input: _joined([item.inputs[slot.b_input] for item in adapters], 0, (0, slot.out_features)),
    }


def is_decoder(manifest: Manifest, role: str) -> bool:
    """Whether a graph is one of the decoder's, with LoRA inputs or without."""
    decoder = manifest.decoder
    return decoder is not None and any(role in pair for pair in decoder.pairs)


def inputs_taken(manifest: Manifest, role: str, inputs: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What `graph_inputs` gives, as the graph of this role takes it."""
    if not is_decoder(manifest, role):
        return inputs
    assert manifest.decoder is not None
    return {} if manifest.decoder.adapted_twin(role) else group_inputs(manifest, inputs)


def group_inputs(manifest: Manifest, inputs: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What `graph_inputs` gives, as the decoder graph takes it: the slots of a group side by side, `B` times
    its scaling.

    The `A` factors in `inputs` become views of the new arrays, so that they are not held twice. Those stand
    in one piece, in the order in which a token reads them: it is read faster than many.
    """
    assert manifest.decoder is not None
    shapes = _group_shapes(manifest, inputs)
    slots = {slot.module: slot for slot in manifest.lora_slots}
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(np.zeros(ends[-1], np.float32), ends[:-1])
    factors = iter([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
    grouped: dict[str, FloatArray] = {}
    for group in manifest.decoder.groups:
        members = [slots[placed.module] for placed in group.slots]
        lora_a, lora_b = next(factors), next(factors)
        np.concatenate([inputs[slot.a_input] for slot in members], axis=1, out=lora_a)
        first = 0
        for slot, placed in zip(members, group.slots, strict=True):
            scaled = inputs[slot.scaling_input][:, None] * inputs[slot.b_input]
            ranks = slice(first, first + len(scaled))
            lora_b[ranks, placed.first : placed.first + slot.out_features] = scaled
            inputs[slot.a_input] = lora_a[:, ranks]
            first = ranks.stop
        grouped |= {group.a_input: lora_a, group.b_input: lora_b}
    return grouped


def group_bytes(manifest: Manifest, inputs: Mapping[str, FloatArray]) -> int:
    """Bytes of what `group_inputs` gives for these inputs."""
    return 4 * sum(math.prod(shape) for shape in _group_shapes(manifest, inputs))


def _group_shapes(manifest: Manifest, inputs: Mapping[str, FloatArray]) -> list[tuple[int, int]]:
    """The shapes of `A` and `B` of every group, one after the other."""
    assert manifest.decoder is not None
    slots = {slot.module: slot for slot in manifest.lora_slots}
    shapes = []
    for group in manifest.decoder.groups:
        # The last axis: scalings of rows with adapters of their own have an axis for the rows, too.
        rank = sum(inputs[slots[placed.module].scaling_input].shape[-1] for placed in group.slots)
        shapes += [(group.in_features, rank), (rank, group.out_features)]
    return shapes


def _joined(parts: Sequence[FloatArray], axis: int, empty: tuple[int, ...]) -> FloatArray:
    """The parts concatenated; a single one itself, and zeros of shape `empty` where there is none."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, axis=axis) if parts else np.zeros(empty, np.float32)


def _times(scaling: FloatArray, weight: float) -> FloatArray:
    return scaling if weight == 1 else scaling * np.float32(weight)


def _saved_input(bundle: Bundle, saved: SavedModule, adapters: Weighted) -> FloatArray:
    carriers = [
        (adapter.inputs[saved.input], weight) for adapter, weight in adapters if saved.input in adapter.inputs
    ]
    if not carriers:
        return bundle.read_weight(saved.default)
    first = carriers[0][0]
    if all(np.array_equal(first, value) for value, _ in carriers[1:]):
        return first
    total = sum(weight for _, weight in carriers)
    if abs(total - 1) > 1e-6:
        raise AdapterError(
            f"module {saved.module} is replaced by {len(carriers)} of the mixed adapters, whose weights sum "
            f"to {total:g}: give these weights that sum to 1, or mix only one adapter that carries it"
        )
    if len({value.shape for value, _ in carriers}) > 1:
        raise AdapterError(
            f"module {saved.module} has more labels in one of the mixed adapters than in another: mix "
            "adapters that know the same"
        )
    mixed = sum((weight * value for value, weight in carriers), np.zeros(first.shape, np.float32))
    return np.ascontiguousarray(mixed, dtype=np.float32)


def to_peft_layout(bundle: Bundle, values: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Tensors in the graphs' layout, keyed by input name, as PEFT has them: both LoRA factors transposed."""
    transposed = {name for slot in bundle.manifest.lora_slots for name in (slot.a_input, slot.b_input)}
    return {
        name: np.ascontiguousarray(value.T) if name in transposed else value.copy()
        for name, value in values.items()
    }
