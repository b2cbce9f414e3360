"""Opening a bundle: nothing of it is used before its manifest, paths, sizes and hashes have been checked."""

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..adapter_fit import check_base, fit
from ..adapters import CONFIG_FILE, TENSOR_FILE, Adapter, load_adapter
from ..errors import AdapterError, BundleError
from .manifest import FileEntry, Manifest
from .serialization import manifest_from_json
from .validation import check_relative_path, is_adapter_name
from .writer import MANIFEST_FILE, hash_file

_MAX_MANIFEST_BYTES = 64 * 2**20
# IO_REPARSE_TAG_MOUNT_POINT: Windows's links to folders that anybody may make; to Python no symbolic ones.
_JUNCTION = 0xA0000003


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest.

    `force` is whether adapters are taken that say they were trained on another base.
    """

    path: Path
    manifest: Manifest
    force: bool = False

    def file(self, relative: str) -> Path:
        """The path of a file of the bundle, after the check that it is a plain file inside it.

        Raises:
            BundleError: the file is missing, or reached through a link.
        """
        check_relative_path(relative, "file")
        return _plain_file(self.path, relative)

    def graph_bytes(self, role: str) -> bytes:
        """The ONNX file of a graph; the very bytes that are returned match the manifest's hash.

        Raises:
            BundleError: the bundle has no such graph, or the file has changed since it was opened.
        """
        graph = self.manifest.graphs.get(role)
        if graph is None:
            known = ", ".join(self.manifest.graphs)
            raise BundleError(
                f"{self.path}: has no graph {role!r}, only {known}: export it with training graphs"
            )
        data = self.file(graph.file).read_bytes()
        entry = self.manifest.files[graph.file]
        _compare(self.path / graph.file, FileEntry(len(data), hashlib.sha256(data).hexdigest()), entry)
        return data

    def read_weight(self, name: str) -> npt.NDArray[np.float32]:
        """A float tensor of the weight file as float32; only its own bytes are read."""
        weight = self.manifest.weights[name]
        with self.file(self.manifest.weights_file).open("rb") as file:
            file.seek(weight.offset)
            stored = np.fromfile(
                file,
                np.dtype(weight.dtype).newbyteorder("<"),
                weight.nbytes // np.dtype(weight.dtype).itemsize,
            )
        return stored.astype(np.float32).reshape(weight.shape)

    def check_weights(self) -> None:
        """Read the weight file once more, which a map of it may have followed.

        Raises:
            BundleError: it is not what it was when the bundle was opened.
        """
        name = self.manifest.weights_file
        _compare(self.path / name, hash_file(self.file(name)), self.manifest.files[name])

    def adapter_names(self) -> tuple[str, ...]:
        """The manifest's adapters and then those whose folders were dropped into `adapters/`."""
        folder = self.path / "adapters"
        dropped = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        return self.manifest.adapters + tuple(
            name
            for name in dropped
            if name not in self.manifest.adapters
            and is_adapter_name(name)
            and (folder / name / CONFIG_FILE).is_file()
        )

    def adapter(self, name: str) -> Adapter:
        """Read an adapter of the bundle by name; it is known to fit the base. Whoever listed it in the
        manifest has vouched for the base that it was trained on.

        Raises:
            AdapterError: there is no such adapter, it is damaged or does not fit, or it was dropped in and is
                of another base.
            BundleError: its folder leads out of the bundle.
        """
        if name not in self.adapter_names():
            known = ", ".join(self.adapter_names()) or "none"
            raise AdapterError(f"{self.path}: has no adapter {name!r} (it has {known})")
        for file in (CONFIG_FILE, TENSOR_FILE):
            if (self.path / "adapters" / name / file).exists():
                self.file(f"adapters/{name}/{file}")
        adapter = load_adapter(self.path / "adapters" / name)
        if name in self.manifest.adapters:
            self._fit(adapter)
        else:
            self.check_fit(adapter)
        return adapter

    def _fit(self, adapter: Adapter) -> None:
        manifest = self.manifest
        head = manifest.linear_head if manifest.takes_labels else None
        fit(adapter, manifest.slots, () if head is None else head.inputs, manifest.model.labels)

    def check_fit(self, adapter: Adapter) -> None:
        """Refuse an adapter that does not belong to the base.

        Raises:
            AdapterError: a tensor has no place in it; or it was trained on another base, without `force`.
        """
        self._fit(adapter)
        if not self.force:
            check_base(adapter, self.manifest.base)


def open_bundle(path: Path | str, *, force: bool = False) -> Bundle:
    """Open a bundle and check every file that its manifest lists.

    Args:
        path: the bundle's folder.
        force: see `Bundle`.

    Raises:
        BundleError: the bundle is missing, damaged, of a newer format or reaches outside its folder; the
            message names the file, what was found against what was expected, and the remedy.
    """
    path = Path(path)
    if not (path / MANIFEST_FILE).exists():
        raise BundleError(f"{path}: {_no_bundle(path)}")
    manifest = read_manifest(path)
    for relative, entry in manifest.files.items():
        file = _plain_file(path, relative)
        # The size first: it is free, and names truncation for what it is.
        if file.stat().st_size != entry.nbytes:
            _compare(file, FileEntry(file.stat().st_size, ""), entry)
        _compare(file, hash_file(file), entry)
    return Bundle(path=path, manifest=manifest, force=force)


def read_manifest(path: Path) -> Manifest:
    """A bundle's manifest, checked against itself alone.

    Raises:
        BundleError: it is missing, damaged or of a newer format.
    """
    manifest_path = _plain_file(path, MANIFEST_FILE)
    if manifest_path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{manifest_path}: is larger than {_MAX_MANIFEST_BYTES:,} B, this is no manifest")
    return manifest_from_json(manifest_path.read_bytes(), str(manifest_path))


def _no_bundle(path: Path) -> str:
    """What a path without a manifest is instead, and what to do."""
    if not path.exists():
        from difflib import get_close_matches  # the one use of it

        beside = [entry.parent.name for entry in path.parent.glob(f"*/{MANIFEST_FILE}")]
        near = [str(path.parent / name) for name in get_close_matches(path.name, beside, cutoff=0.8)]
        return "no such bundle" + (f": did you mean {' or '.join(near)}?" if near else "")
    if not path.is_dir():
        advice = f": edgepeft export {path} -o NAME.edge makes one of it" if path.suffix == ".onnx" else ""
        return f"is a file, expected a bundle's folder{advice}"
    inside = next((parent for parent in path.resolve().parents if (parent / MANIFEST_FILE).exists()), None)
    if inside is not None:
        return f"is a part of a bundle: give {inside}"
    if (path / CONFIG_FILE).exists():
        return "is a PEFT adapter: give a bundle, and the adapter with --adapter"
    if (path / "config.json").exists():
        return f"is a model, no bundle yet: edgepeft export {path} -o NAME.edge makes one of it"
    return f"holds no {MANIFEST_FILE}, so it is no bundle: create one with edgepeft export"


def _compare(path: Path, got: FileEntry, expected: FileEntry) -> None:
    if got.nbytes != expected.nbytes:
        raise BundleError(
            f"{path}: has {got.nbytes:,} B, its manifest says {expected.nbytes:,} B: the file is truncated "
            "or was changed, copy the bundle again"
        )
    if got.sha256 != expected.sha256:
        raise BundleError(
            f"{path}: its sha256 is {got.sha256[:12]}…, its manifest says {expected.sha256[:12]}…: the file "
            "is damaged or was changed, copy the bundle again"
        )


def _plain_file(root: Path, relative: str) -> Path:
    """`root/relative`, with every part below `root` a plain folder or file and not a link of any kind."""
    current = root
    try:
        for part in relative.split("/"):
            current = current / part
            status = current.lstat()
            if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == _JUNCTION:
                raise BundleError(
                    f"{current}: is a symbolic link or a junction, a bundle holds plain files only: copy the "
                    "file"
                )
    except OSError as error:
        raise BundleError(f"{current}: is missing ({error.strerror}): copy the bundle again") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{current}: is not a plain file")
    if status.st_nlink > 1:
        raise BundleError(
            f"{current}: has {status.st_nlink} names on its disk (hard links), so it may change from outside "
            "the bundle: copy the bundle (cp -r) and open the copy"
        )
    return current
