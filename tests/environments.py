"""The requirements at one end of every range in `pyproject.toml`, for an environment of their own.

    python tests/environments.py oldest|newest [device]

`oldest` pins what edgepeft needs to the lower bounds; `newest` leaves the upper bounds away (but torch's,
above which the registry's builds bring gigabytes of CUDA), so that a release which breaks edgepeft is met
here first. The tools of the development environment are the newest in both. With `device`, what a device
needs alone: its lower bounds are lower than those that the exporter's packages ask for. Needs the package
`packaging`.
"""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
#: Extras of the workstation, and extras that hold tools, not what edgepeft imports.
WORKSTATION, TOOLS = ("export", "samples"), ("dev", "docs")
#: Capped in the newest environment, too.
CAPPED = "torch"
#: Asks for a newer onnxruntime than edgepeft's oldest; the tests that read its files are skipped without it.
LEFT_OUT = "onnxruntime-genai"


def requirements(end: str, *, device: bool = False) -> Iterator[str]:
    """One line a package; `end` is `oldest` or `newest`."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    ranges: dict[str, Requirement] = {}
    tools: set[str] = set()
    for group, lines in groups.items():
        if device and group in (*WORKSTATION, *TOOLS):
            continue
        for requirement in map(Requirement, lines):
            if requirement.name == project["name"] or (end, requirement.name) == ("oldest", LEFT_OUT):
                continue
            if requirement.name not in ranges and group in TOOLS:
                tools.add(requirement.name)
            known = ranges.setdefault(requirement.name, requirement)
            known.specifier &= requirement.specifier
    for name, requirement in ranges.items():
        lower = [Version(item.version) for item in requirement.specifier if item.operator == ">="]
        if end == "oldest" and name not in tools and lower:
            requirement.specifier = SpecifierSet(f"=={max(lower)}")
        elif end == "newest" and name != CAPPED:
            kept = [item for item in requirement.specifier if item.operator not in ("<", "<=")]
            requirement.specifier = SpecifierSet(",".join(map(str, kept)))
        yield str(requirement)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["oldest"], ["newest"]) or sys.argv[2:] not in ([], ["device"]):
        sys.exit(__doc__)
    print("\n".join(requirements(sys.argv[1], device=sys.argv[2:] == ["device"])))
