"""The distribution holds what the tree holds: setuptools maps folders that it cannot find by itself."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Folder in the repository → where it is imported from.
FOLDERS = {"edgepeft": "edgepeft", "exporters": "edgepeft/exporters", "runtime": "edgepeft/runtime"}


def installed_path(source: Path) -> str:
    """Where a file of the tree lies in an installation."""
    folder, *rest = source.relative_to(ROOT).parts
    return "/".join([FOLDERS[folder], *rest])


def source_files() -> list[Path]:
    return [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts
    ]


def test_the_list_of_packages_is_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = {installed_path(path.parent).replace("/", ".") for path in source_files()}
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize(
    ("system", "comes"), [("linux", False), ("android", False), ("darwin", True), ("win32", True)]
)
def test_psutil_is_for_systems_without_proc(system: str, comes: bool) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (needed,) = (item for item in map(Requirement, project["dependencies"]) if item.name == "psutil")
    assert needed.marker is not None
    assert needed.marker.evaluate({"sys_platform": system}) == comes


def test_every_folder_of_code_is_a_package():
    for folder in {path.parent for path in source_files()}:
        assert (folder / "__init__.py").exists(), folder


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it and from nothing else."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_tree(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {installed_path(path) for path in source_files()}


@pytest.mark.slow
def test_the_sdist_holds_the_tree_and_the_licence(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in source_files()}
    assert expected | {"LICENSE", "README.md", "pyproject.toml"} <= names
