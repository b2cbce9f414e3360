"""The adapters of a bundle on the disk: adding and removing them, so that a kill leaves a bundle that opens.

The folder of an adapter that the manifest does not list is one that was dropped in. So an adapter's folder
appears whole before the manifest lists it, and leaves the manifest before its folder goes. Who changes a
bundle holds its folder locked meanwhile, and begins with the manifest as it is then.
"""

import contextlib
import filecmp
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..adapters import CONFIG_FILE, TENSOR_FILE, Adapter
from ..errors import AdapterError, BundleError, UsageError
from ..files import atomic_folder, locked, remove_folder, remove_leftovers, scratch_folder
from .manifest import Manifest
from .reader import Bundle, read_manifest
from .validation import ADAPTER_NAMES, is_adapter_name
from .writer import hash_file, write_manifest

_ADAPTER_FILES = (CONFIG_FILE, TENSOR_FILE)


def check_has_effect(bundle: Bundle, adapter: Adapter) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        AdapterError: it has no effect.
    """
    defaults = {
        name: bundle.read_weight(tensor.default)
        for name, tensor in bundle.manifest.adapter_inputs.items()
        if tensor.default is not None and name in adapter.tensors
    }
    if not adapter.has_effect(defaults):
        raise AdapterError(
            f"{adapter.origin}: has no effect: {adapter.technique.inert} and no saved module differs from "
            "the base's: train it first"
        )


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's two files, byte for byte, into an existing folder.

    Raises:
        AdapterError: a file is missing or cannot be read.
    """
    for name in _ADAPTER_FILES:
        if not (source / name).is_file():
            raise AdapterError(
                f"{source}: holds no {name}: a PEFT adapter has {CONFIG_FILE} and {TENSOR_FILE}"
            )
        shutil.copyfile(source / name, target / name)


def add_adapter(bundle: Bundle, name: str, adapter: Adapter, write: Callable[[Path], None]) -> Bundle:
    """Add an adapter to a bundle and list it, with its hashes, in the manifest.

    One that was dropped in by that name, with the same files, is listed: an addition that was killed ends so.

    Args:
        bundle: the bundle; what it holds stays as it is where anything fails.
        name: the adapter's name.
        adapter: the adapter.
        write: writes the adapter's two files into an empty folder.

    Returns:
        The bundle with it.

    Raises:
        UsageError: the name cannot be used, or is taken.
        AdapterError: the adapter does not fit the base, was trained on another, or has no effect.
        BundleError: the bundle was replaced by another meanwhile.
        EdgePeftError: the disk cannot be written.
    """
    if not is_adapter_name(name):
        raise UsageError(f"adapter name {name!r} is not usable: {ADAPTER_NAMES}")
    folder = bundle.path / "adapters" / name
    bundle.check_fit(adapter)
    check_has_effect(bundle, adapter)
    with _changing(bundle) as bundle:
        taken = [other for other in bundle.adapter_names() if other.casefold() == name.casefold()]
        dropped_in = taken == [name] and name not in bundle.manifest.adapters
        refusal = UsageError(
            f"{bundle.path}: has an adapter {(taken or [name])[0]!r} already: remove it first, or use "
            "another name"
        )
        if not dropped_in and (taken or folder.exists() or folder.is_symlink()):
            raise refusal
        if dropped_in:
            with scratch_folder(folder) as scratch:
                write(scratch)
                if not _same_files(scratch, folder):
                    raise refusal
        else:
            with atomic_folder(folder, CONFIG_FILE) as temporary:
                write(temporary)
        files = {f"adapters/{name}/{file}": hash_file(folder / file) for file in _ADAPTER_FILES}
        return _rewritten(
            bundle,
            replace(
                bundle.manifest,
                adapters=(*bundle.manifest.adapters, name),
                files=bundle.manifest.files | files,
            ),
        )


def remove_adapter(bundle: Bundle, name: str) -> Bundle:
    """Take an adapter out of a bundle.

    Returns:
        The bundle without it.

    Raises:
        AdapterError: the bundle has no such adapter.
        BundleError: the bundle was replaced by another meanwhile.
        EdgePeftError: the disk cannot be written.
    """
    with _changing(bundle) as bundle:
        if name not in bundle.adapter_names():
            known = ", ".join(bundle.adapter_names()) or "none"
            raise AdapterError(f"{bundle.path}: has no adapter {name!r} (it has {known})")
        if name in bundle.manifest.adapters:
            prefix = f"adapters/{name}/"
            files = {
                path: item for path, item in bundle.manifest.files.items() if not path.startswith(prefix)
            }
            adapters = tuple(other for other in bundle.manifest.adapters if other != name)
            bundle = _rewritten(bundle, replace(bundle.manifest, adapters=adapters, files=files))
        remove_folder(bundle.path / "adapters" / name)
        return bundle


@contextlib.contextmanager
def _changing(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle as it is now, which no other process changes meanwhile (but on Windows), without what one
    that died has left."""
    with locked(bundle.path):
        remove_leftovers(bundle.path)
        remove_leftovers(bundle.path / "adapters")
        manifest = read_manifest(bundle.path)
        if _without_adapters(manifest) != _without_adapters(bundle.manifest):
            raise BundleError(f"{bundle.path}: was replaced by another bundle meanwhile: try again")
        yield replace(bundle, manifest=manifest)


def _same_files(one: Path, other: Path) -> bool:
    return len(filecmp.cmpfiles(one, other, _ADAPTER_FILES, shallow=False)[0]) == len(_ADAPTER_FILES)


def _without_adapters(manifest: Manifest) -> Manifest:
    files = {path: item for path, item in manifest.files.items() if not path.startswith("adapters/")}
    return replace(manifest, adapters=(), files=files)


def _rewritten(bundle: Bundle, manifest: Manifest) -> Bundle:
    write_manifest(manifest, bundle.path)
    return replace(bundle, manifest=manifest)
