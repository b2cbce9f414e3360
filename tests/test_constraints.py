"""The exact versions that a clone installs are written down and lie inside the declared ranges."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def test_every_declared_package_has_one_exact_version_inside_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    groups.append(project["build-system"]["requires"])
    exact = pinned()
    for requirement in (Requirement(line) for group in groups for line in group):
        if requirement.name == "edgepeft" or not (
            requirement.marker is None or requirement.marker.evaluate()
        ):
            continue
        (specifier,) = exact[requirement.name.lower().replace("_", "-")].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{requirement}: {specifier}"


def test_no_version_names_a_local_build() -> None:
    """`torch==2.13.0+cpu` exists on one machine's disk alone."""
    assert not any("+" in str(requirement.specifier) for requirement in pinned().values())
