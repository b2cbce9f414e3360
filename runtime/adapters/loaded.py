"""The adapters that a loaded bundle keeps in memory, and what a call asks for as graph inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from edgepeft.adapters import CONFIG_FILE, TENSOR_FILE, read_labels
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.validation import is_adapter_name
from edgepeft.errors import AdapterError, UsageError
from edgepeft.techniques.base import FloatArray

from .graph_inputs import (
    AdapterSpec,
    PreparedAdapter,
    Weighted,
    check_effect_of,
    find_adapter,
    graph_inputs,
    is_path,
    prepare,
    resolve,
    row_inputs,
    weights_of,
)
from .virtual_tokens import Virtual, of_rows, virtual_slots

AdapterSpecs: TypeAlias = AdapterSpec | list[AdapterSpec] | tuple[AdapterSpec, ...]
"""One specification for all rows of a batch, or a list with one for each."""


class AdapterRegistry:
    """Loaded adapters are kept as the graphs take them, so that activating one only binds it; each costs its
    own bytes. Adapters that are not loaded are read from the disk whenever they are activated.

    Args:
        bundle: the bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._loaded: dict[str, PreparedAdapter] = {}
        self._array_ids: frozenset[int] = frozenset()
        self._has_virtual = bool(virtual_slots(bundle.manifest))
        self._virtual: tuple[object, list[Virtual]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._loaded)

    @property
    def nbytes(self) -> int:
        """Bytes that the loaded adapters take."""
        return sum(adapter.nbytes for adapter in self._loaded.values())

    def holds(self, array: FloatArray) -> bool:
        """Whether an adapter's input is a loaded adapter's own array, which `nbytes` counts."""
        return id(array) in self._array_ids

    def load(self, name: str, path: str | Path | None) -> None:
        """Keep an adapter in memory; see `Model.load_adapter`."""
        if not is_adapter_name(name):
            raise UsageError(
                f"adapter name {name!r} is not usable: letters, digits, '.', '_' and '-' only, at most 64"
            )
        if name in self._loaded:
            raise UsageError(f"an adapter {name!r} is loaded already: unload it first")
        if path is None:
            adapter = find_adapter(self._bundle, name)
        elif name in self._bundle.adapter_names():
            raise UsageError(f"the bundle has an adapter {name!r} of its own: load this one by another name")
        else:
            adapter = find_adapter(self._bundle, Path(path))
        check_effect_of(self._bundle, adapter)
        self._loaded[name] = prepare(self._bundle, adapter)
        self._know_arrays()

    def unload(self, name: str) -> None:
        """Free a loaded adapter.

        Raises:
            AdapterError: none of that name is loaded.
        """
        if name not in self._loaded:
            raise AdapterError(f"no adapter {name!r} is loaded (loaded: {', '.join(self._loaded) or 'none'})")
        del self._loaded[name]
        self._know_arrays()

    def _know_arrays(self) -> None:
        self._virtual = None  # a name may stand for another adapter now
        self._array_ids = frozenset(
            id(array) for adapter in self._loaded.values() for array in adapter.inputs.values()
        )

    def labels(self, spec: AdapterSpecs) -> tuple[str, ...]:
        """The labels that a classifier has with what a call asks for.

        Raises:
            UsageError: adapters of one call know different ones.
            AdapterError: what an adapter says of its labels cannot be read.
        """
        own = self._bundle.manifest.model.labels
        parts = _rows(spec)
        if parts is None:
            assert not isinstance(spec, list | tuple)
            parts = [spec]
        found = {self._labels_of(name) or own for part in parts for name in weights_of(part)} or {own}
        if len(found) > 1:
            raise UsageError(
                "adapter: the adapters of one call know different labels: call once for each, so that every "
                "result has the labels of its own"
            )
        return found.pop()

    def _labels_of(self, name: str | Path) -> tuple[str, ...] | None:
        if isinstance(name, str) and name in self._loaded:
            return self._loaded[name].labels
        folder = Path(name) if is_path(name) else self._bundle.path / "adapters" / name
        return read_labels(folder) if (folder / TENSOR_FILE).is_file() else None

    def virtual_tokens(self, spec: AdapterSpecs, count: int) -> list[Virtual] | None:
        """What stands in front of each of `count` rows; None where no adapter of the bundle can have any.

        Raises:
            UsageError, AdapterError: see `inputs`.
        """
        if not self._has_virtual:
            return None
        spec = simplified(spec)
        rows = list(spec) if isinstance(spec, list | tuple) else [spec]
        stamp = stamped(spec)
        if self._virtual is None or self._virtual[0] != stamp:
            # What is activated already is not read again for every batch.
            found = of_rows(self._bundle.manifest, self._resolved(rows, check_effect=False))
            self._virtual = stamp, found
        return self._virtual[1] if isinstance(spec, list | tuple) else self._virtual[1] * count

    def inputs(self, spec: AdapterSpecs, *, check_effect: bool = True) -> dict[str, FloatArray]:
        """The adapter inputs of what a call asks for.

        Raises:
            UsageError: a weight is not a finite number.
            AdapterError: an adapter is missing, damaged, does not fit or has no effect; or rows of one batch
                cannot differ in it.
        """
        rows = _rows(spec)
        if rows is None:
            assert not isinstance(spec, list | tuple)
            chosen = resolve(self._bundle, spec, check_effect=check_effect, loaded=self._loaded)
            return graph_inputs(self._bundle, chosen)
        return row_inputs(self._bundle, self._resolved(rows, check_effect=check_effect))

    def _resolved(self, rows: Sequence[AdapterSpec], *, check_effect: bool) -> list[Weighted]:
        """Each row's adapters; every one is read once, whatever number of rows uses it."""
        named = {str(name): name for row in rows for name in weights_of(row)}
        at_hand = {
            key: adapter
            for key, name in named.items()
            for adapter, _ in resolve(self._bundle, name, check_effect=check_effect, loaded=self._loaded)
        }
        return [resolve(self._bundle, row, loaded=at_hand) for row in rows]


def check_rows(spec: AdapterSpecs, count: int, what: str) -> None:
    """Refuse a list of specifications of another length than what it is for.

    Raises:
        UsageError: says both lengths.
    """
    rows = _rows(spec)
    if rows is not None and len(rows) != count:
        raise UsageError(
            f"adapter: is a list of {len(rows)}, the batch has {count} {what}: give one for each"
        )


def grouped(spec: AdapterSpecs, count: int) -> list[tuple[AdapterSpec, list[int]]]:
    """The adapters that differ, each with the rows of a batch of `count` that have it."""
    rows = _rows(spec)
    if rows is None:
        assert not isinstance(spec, list | tuple)
        return [(spec, list(range(count)))]
    groups: list[tuple[object, AdapterSpec, list[int]]] = []
    for index, row in enumerate(rows):
        stamp = stamped(row)
        members = next((members for other, _, members in groups if other == stamp), None)
        if members is None:
            groups.append((stamp, row, [index]))
        else:
            members.append(index)
    return [(row, members) for _, row, members in groups]


def part_of(spec: AdapterSpecs, indices: Sequence[int]) -> AdapterSpecs:
    """The specification for some rows of what it was given for."""
    rows = _rows(spec)
    return spec if rows is None else [rows[index] for index in indices]


def simplified(spec: AdapterSpecs) -> AdapterSpecs:
    """A list of entries that are all the same as one entry, so that the batch may have any size."""
    rows = _rows(spec)
    return rows[0] if rows and all(stamped(row) == stamped(rows[0]) for row in rows) else spec


def stamped(spec: AdapterSpecs) -> object:
    """What is equal for two specifications as long as they mean the same adapters: folders outside the bundle
    by the time and size of their files."""
    rows = _rows(spec)
    if rows is not None:
        return tuple(stamped(row) for row in rows)
    assert not isinstance(spec, list | tuple)
    return [(str(name), weight, *_files(name)) for name, weight in weights_of(spec).items()]


def names_in(spec: AdapterSpecs) -> set[str]:
    """The adapters that a specification names."""
    rows = _rows(spec)
    if rows is not None:
        return {name for row in rows for name in names_in(row)}
    assert not isinstance(spec, list | tuple)
    return {str(name) for name in weights_of(spec)}


def _rows(spec: AdapterSpecs) -> list[AdapterSpec] | None:
    """The specifications of rows that differ, or None where all rows have the same."""
    return list(spec) if isinstance(spec, list | tuple) else None


def _files(name: str | Path) -> tuple[int, ...]:
    if not is_path(name):
        return ()
    try:
        found = [(Path(name) / file).stat() for file in (CONFIG_FILE, TENSOR_FILE)]
    except OSError:
        return ()  # reading it says what is wrong
    return tuple(number for item in found for number in (item.st_mtime_ns, item.st_size, item.st_ino))
