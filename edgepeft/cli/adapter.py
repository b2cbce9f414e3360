"""`edgepeft adapter`: list, add, remove and export the adapters of a bundle."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterError, UsageError
from ..sizes import format_size
from .console import Console
from .group import Group
from .options import bundle_argument, force_option, json_option, table

if TYPE_CHECKING:
    from ..adapters import Adapter, StoredDtype
    from ..bundle.reader import Bundle

ONNX_SUFFIX = ".onnx_adapter"


def dtype_option() -> Callable[[Any], Any]:
    """`--dtype`: what an adapter's tensors are stored as."""
    return click.option(
        "--dtype",
        type=click.Choice(["float16", "float32"]),
        help="Store tensors as float16 (half the bytes; PEFT and edgepeft read them as float32) or float32; "
        "byte for byte as they are unless given.",
    )


@click.group(cls=Group, short_help="List, add, remove and export adapters.")
def adapter() -> None:
    """List, add, remove and export the adapters of a bundle.

    \b
    Example:
      edgepeft adapter add model.edge mine=./my-adapter
      edgepeft adapter list model.edge
      edgepeft adapter export model.edge mine -o mine.onnx_adapter
      edgepeft adapter remove model.edge mine
    """


@adapter.command("list", short_help="Show the adapters.")
@bundle_argument()
@json_option()
@click.pass_obj
def list_adapters(console: Console, /, bundle: str) -> None:
    """Show the adapters of BUNDLE: those that its manifest lists, and folders that were dropped into it.

    \b
    Example:
      edgepeft adapter list model.edge
    """
    from ..bundle.reader import open_bundle

    opened = open_bundle(bundle)
    console.show([_entry(opened, name) for name in opened.adapter_names()], _table)


@adapter.command(short_help="Add adapters.")
@bundle_argument()
@click.argument("adapters", nargs=-1, required=True, metavar="NAME=PATH...")
@dtype_option()
@force_option()
@json_option()
@click.pass_obj
def add(
    console: Console, /, bundle: str, adapters: tuple[str, ...], dtype: "StoredDtype | None", force: bool
) -> None:
    """Add PEFT folders, or .onnx_adapter files that were made for this bundle, to BUNDLE.

    Each is checked for its fit and its effect first; one that says it was trained on another base is added
    with --force, and needs it no more. A bundle whose add is interrupted stays as it was.

    \b
    Example:
      edgepeft adapter add model.edge mine=./my-adapter
    """
    from ..bundle.adapter_store import add_adapter
    from ..bundle.reader import open_bundle

    named = [_named(item) for item in adapters]
    console.progress.stage("opening the bundle")
    opened = open_bundle(bundle, force=force)
    with _changes(console, bundle, "added") as added:
        for name, path in named:
            source = _source(opened, path, dtype)
            console.interrupts.hold(f"adding {name}")
            opened = add_adapter(opened, name, *source)
            added.append(name)
            console.interrupts.release()


@adapter.command(short_help="Remove adapters.")
@bundle_argument()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option()
@click.pass_obj
def remove(console: Console, /, bundle: str, names: tuple[str, ...]) -> None:
    """Remove adapters from BUNDLE, folders and all.

    \b
    Example:
      edgepeft adapter remove model.edge mine
    """
    from ..bundle.adapter_store import remove_adapter
    from ..bundle.reader import open_bundle

    console.progress.stage("opening the bundle")
    opened = open_bundle(bundle)
    with _changes(console, bundle, "removed") as removed:
        for name in names:
            console.interrupts.hold(f"removing {name}")
            opened = remove_adapter(opened, name)
            removed.append(name)
            console.interrupts.release()


@adapter.command("export", short_help="Copy an adapter out.")
@bundle_argument()
@click.argument("name")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help=f"A PEFT folder, or a file that ends with {ONNX_SUFFIX} for onnxruntime's LoraAdapter.",
)
@dtype_option()
@force_option()
@json_option()
@click.pass_obj
def export_adapter(
    console: Console, /, bundle: str, name: str, output: Path, dtype: "StoredDtype | None", force: bool
) -> None:
    """Copy the adapter NAME of BUNDLE out of it: as the PEFT folder that it is, or as one file for
    onnxruntime's LoraAdapter.

    \b
    Example:
      edgepeft adapter export model.edge mine -o ./mine --dtype float16
      edgepeft adapter export model.edge mine -o mine.onnx_adapter
    """
    from ..adapters import CONFIG_FILE
    from ..bundle.reader import open_bundle
    from ..files import atomic_folder

    opened = open_bundle(bundle, force=force)
    held = opened.adapter(name)
    if output.suffix == ONNX_SUFFIX:
        if dtype == "float16":
            raise UsageError(f"{output}: holds what the graphs take, float32: leave out --dtype float16")
        from edgepeft.runtime.adapters.onnx_adapter import write_onnx_adapter

        write_onnx_adapter(opened, held, output)
    else:
        write = _writer(held, opened.path / "adapters" / name, dtype)[1]
        with atomic_folder(output, CONFIG_FILE) as folder:
            write(folder)
    console.show(
        {"bundle": bundle, "adapter": name, "output": str(output)}, lambda told: f"wrote {told['output']}"
    )


def _named(item: str) -> tuple[str, Path]:
    """The name and the path of NAME=PATH."""
    name, separator, path = item.partition("=")
    if not (name and separator and path):
        raise UsageError(f"{item}: write NAME=PATH, such as mine=./my-adapter")
    return name, Path(path)


@contextlib.contextmanager
def _changes(console: Console, bundle: str, what: str) -> Iterator[list[str]]:
    """Names to be collected, of which the console tells whether or not the command fails after some."""
    names: list[str] = []
    try:
        yield names
    finally:
        if names:
            console.show(
                {"bundle": bundle, what: names},
                lambda told: "\n".join(f"{what} {name}" for name in told[what]),
            )


def _source(
    bundle: "Bundle", path: Path, dtype: "StoredDtype | None"
) -> "tuple[Adapter, Callable[[Path], None]]":
    """The adapter at a path as it will be stored, and what writes its files into a folder."""
    if path.suffix == ONNX_SUFFIX:
        from edgepeft.runtime.adapters.onnx_adapter import read_onnx_adapter

        return _writer(read_onnx_adapter(bundle, path), path, dtype or "float32")
    from ..adapters import load_adapter

    return _writer(load_adapter(path), path, dtype)


def _writer(
    adapter: "Adapter", path: Path, dtype: "StoredDtype | None"
) -> "tuple[Adapter, Callable[[Path], None]]":
    """The adapter with the values that are stored, and what writes its files into a folder: byte for byte
    those of the folder at `path` where no dtype is asked for."""
    from ..adapters import rounded, write_adapter
    from ..bundle.adapter_store import copy_adapter

    if dtype is None:
        return adapter, lambda folder: copy_adapter(path, folder)
    stored = rounded(adapter, dtype)
    return stored, lambda folder: write_adapter(stored, folder, dtype)


def _entry(bundle: "Bundle", name: str) -> dict[str, Any]:
    """What the list says of an adapter; of one that cannot be used, why."""
    from ..adapters import TENSOR_FILE

    entry: dict[str, Any] = {"name": name, "in_manifest": name in bundle.manifest.adapters}
    try:
        held = bundle.adapter(name)
    except AdapterError as error:
        return entry | {"error": str(error)}
    file = bundle.path / "adapters" / name / TENSOR_FILE
    ranks = sorted({held.rank(module) for module in held.modules} - {0})
    return entry | {
        "technique": held.technique.name,
        "ranks": ranks,
        "modules": len(held.modules),
        "saved_modules": len(held.saved_keys),
        "lora_alpha": held.config.get("lora_alpha"),
        "parameters": held.parameters,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "base_model": held.config.get("base_model_name_or_path"),
        "base": held.base,
    }


def _table(entries: list[dict[str, Any]]) -> str:
    rows = [
        [entry["name"], f"cannot be used: {entry['error']}"]
        if "error" in entry
        else [
            entry["name"],
            ", ".join(map(str, entry["ranks"])) or entry["technique"],
            f"{entry['modules']} + {entry['saved_modules']} saved",
            str(entry["lora_alpha"]),
            format_size(entry["bytes"]),
            entry["sha256"][:12],
            "bundle" if entry["in_manifest"] else "dropped in",
        ]
        for entry in entries
    ]
    if not rows:
        return "no adapters"
    good = [row for row in rows if len(row) > 2]
    lines = (
        [] if not good else [table(good, ["adapter", "rank", "modules", "alpha", "size", "sha256", "from"])]
    )
    return "\n".join([*lines, *(f"{row[0]}  {row[1]}" for row in rows if len(row) == 2)])
