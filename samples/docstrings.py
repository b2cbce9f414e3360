"""Real English that every machine with Python has: the standard library's docstrings, labelled by area.

    python samples/docstrings.py OUT                    writes OUT/train.jsonl and OUT/test.jsonl
    python samples/docstrings.py OUT 50 email files     of these areas only, 50 each (and 25 to test on)

Each record is `{"text": a docstring, "label": the area of the library it comes from}`. The sources are
parsed, never imported. A whole top-level class or function goes to one side of the split, chosen by a hash of
its name, so no method of a class seen in training is asked about; texts that recur are kept once, texts that
recur under two labels are dropped, and a test text that is nearly the same as a training text is dropped too.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# What Python 3.11 to 3.13 all have (`datetime` moved to `_pydatetime` in 3.12); not what distributions
# package apart (tkinter, idlelib, turtle, venv), nor what was removed since (distutils).
AREAS = {
    "concurrency": (
        "_threading_local asyncio concurrent contextvars multiprocessing queue sched subprocess threading"
    ),
    "email": "email mailbox mimetypes quopri",
    "files": (
        "_pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os "
        "pathlib posixpath shelve shutil stat tarfile tempfile zipapp zipfile"
    ),
    "introspection": (
        "abc ast compileall dataclasses dis enum importlib inspect modulefinder opcode "
        "pickletools pkgutil py_compile pyclbr pydoc runpy symtable tokenize types typing "
        "zipimport"
    ),
    "networking": (
        "ftplib http imaplib ipaddress poplib selectors smtplib socket socketserver ssl "
        "urllib webbrowser wsgiref xmlrpc"
    ),
    "numbers and dates": (
        "_pydatetime _pydecimal _strptime calendar colorsys datetime fractions numbers "
        "random statistics zoneinfo"
    ),
    "testing": ("bdb cProfile cmd doctest pdb profile pstats timeit trace traceback tracemalloc unittest"),
    "text": (
        "base64 codecs configparser csv difflib encodings gettext html json locale plistlib "
        "pprint re shlex string textwrap tomllib xml"
    ),
}
MIN_WORDS = 12  # "Return the value." says nothing about where it comes from
TEST_SHARE = 4  # one top-level class or function in so many is held out
NEAR_DUPLICATE = 0.75  # Jaccard similarity of the sets of words


class Docstring(NamedTuple):
    """One docstring: whitespace collapsed, with the area and the top-level definition it comes from."""

    text: str
    label: str
    origin: str  # "module:definition", "module:" for a module's own


def gather(stdlib: Path) -> list[Docstring]:
    """All docstrings of `AREAS` below `stdlib`, each text once, in a fixed order."""
    found: dict[str, Docstring] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for label, modules in AREAS.items():
        for module in modules.split():
            for path in _sources(stdlib, module):
                name = ".".join(path.relative_to(stdlib).with_suffix("").parts)
                for definition, docstring in _docstrings(path):
                    text = " ".join(docstring.split())
                    if len(text.split()) < MIN_WORDS:
                        continue
                    key = " ".join(_words(text))
                    labels[key].add(label)
                    found.setdefault(key, Docstring(text, label, f"{name}:{definition}"))
    return [docstring for key, docstring in found.items() if len(labels[key]) == 1]


def split(docstrings: list[Docstring]) -> tuple[list[Docstring], list[Docstring]]:
    """Training and test docstrings, by their top-level definition, without near duplicates across the two."""
    train = [d for d in docstrings if _digest(d.origin) % TEST_SHARE]
    train_words = [set(_words(d.text)) for d in train]
    test = [d for d in docstrings if not _digest(d.origin) % TEST_SHARE]
    kept = [d for d in test if not _has_near_duplicate(set(_words(d.text)), train_words)]
    return train, kept


def some(docstrings: list[Docstring], each: int, areas: Sequence[str]) -> list[Docstring]:
    """`each` docstrings of every area, chosen by a hash of their texts, in the order that they came in."""
    chosen: set[str] = set()
    for area in areas:
        texts = [docstring.text for docstring in docstrings if docstring.label == area]
        chosen.update(sorted(texts, key=_digest)[:each])
    return [docstring for docstring in docstrings if docstring.label in areas and docstring.text in chosen]


def write(out: Path, each: int | None = None, areas: Sequence[str] = tuple(AREAS)) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl` of this Python's library.

    Args:
        out: their folder.
        each: docstrings of an area to train on, and half as many to test on; all where None.
        areas: which of `AREAS`.

    Returns:
        The paths of both.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = out / "train.jsonl", out / "test.jsonl"
    train, test = split(gather(Path(sysconfig.get_path("stdlib"))))
    if each is not None:
        train, test = some(train, each, areas), some(test, each // 2, areas)
    for path, docstrings in zip(paths, (train, test), strict=True):
        lines = (
            json.dumps({"text": d.text, "label": d.label}, ensure_ascii=False) + "\n" for d in docstrings
        )
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _sources(stdlib: Path, module: str) -> list[Path]:
    """The source files of a module or package, without its tests; none where this Python lacks the module."""
    package = stdlib / module
    if package.is_dir():
        return sorted(
            p for p in package.rglob("*.py") if not {"test", "tests"} & set(p.relative_to(stdlib).parts)
        )
    source = stdlib / f"{module}.py"
    return [source] if source.exists() else []


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (top-level definition, docstring) for the module, its classes, functions and methods."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    for top in [tree, *tree.body]:
        nodes = [top] if isinstance(top, ast.Module) else ast.walk(top)
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield getattr(top, "name", ""), docstring


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _has_near_duplicate(words: set[str], others: list[set[str]]) -> bool:
    return any(
        len(words & other) >= NEAR_DUPLICATE * len(words | other)
        for other in others
        if NEAR_DUPLICATE * len(words) <= len(other) <= len(words) / NEAR_DUPLICATE
    )


if __name__ == "__main__":
    out, *rest = sys.argv[1:] or [""]
    if not out or len(rest) == 1 or (rest and not (rest[0].isdecimal() and set(rest[1:]) <= AREAS.keys())):
        sys.exit(f"usage: python samples/docstrings.py OUT [EACH AREA...], of the areas {', '.join(AREAS)}")
    for written in write(Path(out), int(rest[0]), rest[1:]) if rest else write(Path(out)):
        print(written)
