"""The adapters of an export: read, checked against the base, and completed by a fresh one."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepeft.adapter_fit import check_base
from edgepeft.adapters import Adapter, load_adapter
from edgepeft.errors import AdapterError
from edgepeft.slots import LINEAR, LORA
from edgepeft.techniques.base import Settings
from edgepeft.techniques.lora_sites import SITE

from ..options import STARTING_ADAPTER, ExportOptions
from ..sources.base import ModelSource
from . import graph_technique
from .lora_fresh import write_fresh_adapter
from .mutated_base import as_plain, is_repeatable
from .stored_modules import prepare_stored

Report = Callable[[str], None]


@dataclass
class Adapters:
    """Adapters by name, and the folders that PEFT reads the same from."""

    loaded: dict[str, Adapter]
    folders: dict[str, Path]

    @property
    def modules(self) -> dict[str, dict[str, Settings]]:
        """Modules that one of them is applied to, each with its slot's settings, by technique.

        Raises:
            AdapterError: two of them need other settings on one module, or tensors of one name for slots of
                different techniques.
        """
        found: dict[str, dict[str, Settings]] = {}
        for adapter in self.loaded.values():
            found.setdefault(adapter.technique.name, {})
            alike = [
                other.technique
                for other in self.loaded.values()
                if other.technique.peft_type == adapter.technique.peft_type
                and other.technique is not adapter.technique
            ]
            for technique, module in adapter.placed:
                of_technique = found.setdefault(technique.name, {})
                other = next((item for item in alike if module in found.get(item.name, ())), None)
                if other is not None:
                    raise AdapterError(
                        f"{adapter.origin}: module {module} needs a slot for {technique.title}, another "
                        f"adapter one for {other.title}, and PEFT calls the tensors of both the same: export "
                        "each in a bundle of its own"
                    )
                settings = technique.settings(adapter, module)
                if of_technique.setdefault(module, settings) != settings:
                    raise AdapterError(
                        f"{adapter.origin}: module {module} needs a slot with {dict(settings)}, another "
                        f"adapter one with {dict(of_technique[module])}: export each in a bundle of its own"
                    )
        return found


def read_adapters(options: ExportOptions) -> Adapters:
    """Those that were given, before the model is loaded, but those that need its weights to be read.

    Raises:
        AdapterError: a folder holds none that can be used.
    """
    folders = {name: Path(folder) for name, folder in (options.adapters or {}).items()}
    loaded = {name: load_adapter(folder) for name, folder in folders.items() if not is_repeatable(folder)}
    return Adapters(loaded, folders)


def read_others(adapters: Adapters, source: ModelSource, scratch: Path) -> Adapters:
    """The same with those whose initialization changed the base, as plain ones of the base as it is loaded.

    Raises:
        AdapterError: a folder holds none that can be used, or of another base.
    """
    plain = dict[str, Path]()
    for name in adapters.folders.keys() - adapters.loaded.keys():
        converted = scratch / "plain" / str(len(plain))
        as_plain(adapters.folders[name], source, converted)
        plain[name] = converted
    read = {name: load_adapter(folder) for name, folder in plain.items()}
    return Adapters({**adapters.loaded, **read}, {**adapters.folders, **plain})


def prepare_adapters(
    adapters: Adapters, source: ModelSource, base: str, options: ExportOptions, scratch: Path, report: Report
) -> Adapters:
    """The same, fitted to the source, and a fresh one where a rank was asked for.

    Args:
        source: is made ready to have replaced what adapters store whole.
        base: its fingerprint.
        options: their targets by the names that the source has for them.
        scratch: a folder for the fresh adapter.

    Raises:
        AdapterError: one does not fit the model, or was trained on another.
        UsageError: a fresh one cannot be made.
    """
    _check_modules(adapters.loaded, source)
    for folder in adapters.folders.values():
        source.check_patterns(folder)
    loaded, folders = prepare_stored(adapters.loaded, source, report), dict(adapters.folders)
    if options.rank is not None and options.method == LORA:
        folder = folders[STARTING_ADAPTER] = scratch / STARTING_ADAPTER
        write_fresh_adapter(source, folder, options)
        loaded[STARTING_ADAPTER] = load_adapter(folder)
        _check_modules({STARTING_ADAPTER: loaded[STARTING_ADAPTER]}, source)
    for name, adapter in loaded.items():
        if not options.force:
            check_base(adapter, base)
        loaded[name] = dataclasses.replace(adapter, base=base)
    return Adapters(loaded, folders)


def _check_modules(adapters: Mapping[str, Adapter], source: ModelSource) -> None:
    """Name the first linear module of an adapter that this model does not have, or has in another size."""
    called = source.called_linears() if adapters else set()
    for adapter in adapters.values():
        if graph_technique(adapter.technique.name).site != LINEAR:
            continue
        for name in adapter.modules:
            if adapter.technique.settings(adapter, name).get(SITE, LINEAR) != LINEAR:
                continue  # the graph says whether it has one
            if not source.has_matrix(name):
                raise AdapterError(
                    f"{adapter.origin}: module {name} is no linear of {source.name}: "
                    "the adapter was made for another base"
                )
            if name not in called:
                raise AdapterError(
                    f"{adapter.origin}: {source.name} never calls its module {name} but hands its weight to "
                    f"a function, so PEFT's {adapter.technique.title} has no effect there: train an adapter "
                    "without it"
                )
