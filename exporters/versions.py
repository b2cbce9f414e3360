"""Which versions of its dependencies the exporter was run with."""

from importlib import metadata

from packaging.requirements import Requirement

#: The extra whose packages' ranges are closed: the oldest and the newest version of each were run.
EXTRA = "export"


def requirements_run() -> dict[str, Requirement]:
    """What the exporter needs, by package, each with the range whose both ends were run.

    The ranges are those of `pyproject.toml`, read from the installed package, so they stand nowhere else.
    Empty where edgepeft runs from a folder without being installed.
    """
    try:
        declared = metadata.requires("edgepeft") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, declared):
        if requirement.marker is None or requirement.marker.evaluate({"extra": EXTRA}):
            # A base dependency is named again in the extra where the exporter bounds it further.
            known = found.setdefault(requirement.name, requirement)
            known.specifier &= requirement.specifier
    return found


def range_run(package: str) -> str:
    """The versions of `package` that were run, as a requirement's range; `unknown` where edgepeft is not
    installed."""
    requirement = requirements_run().get(package)
    return "unknown" if requirement is None else str(requirement.specifier)


def outside_range() -> list[str]:
    """Installed packages whose version was not run: `transformers 5.30.0 (run: <=5.24.0,>=5.14.1)`."""
    found = []
    for requirement in requirements_run().values():
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} (run: {requirement.specifier})")
    return found
