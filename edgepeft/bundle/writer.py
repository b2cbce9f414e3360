"""What an exporter needs to close a bundle: hashes of its files and the manifest over them."""

import hashlib
from pathlib import Path

from ..errors import BundleError
from ..files import atomic_write
from .manifest import FileEntry, Manifest
from .serialization import manifest_to_json

MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 2**20


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read a mebibyte at a time.

    Raises:
        BundleError: the file cannot be read.
    """
    digest, nbytes = hashlib.sha256(), 0
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                nbytes += len(chunk)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    return FileEntry(nbytes=nbytes, sha256=digest.hexdigest())


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """`Manifest.files` for everything below `folder`, the manifest excepted."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path != Path(folder) / MANIFEST_FILE
    }


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into a bundle's folder.

    Raises:
        BundleError: the manifest contradicts itself.
        EdgePeftError: the file cannot be written.
    """
    atomic_write(Path(folder) / MANIFEST_FILE, manifest_to_json(manifest).encode())
