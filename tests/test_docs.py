"""What is written down exists: commands, links, the generated pages."""

import ast
import importlib.util
import re
from pathlib import Path

import click
import pytest

from edgepeft import errors
from edgepeft.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("samples/*.md")])
CONTEXT = click.Context(main, info_name="edgepeft", **main.context_settings)
COMMANDS = main.list_commands(CONTEXT)


def command(name: str) -> click.Command:
    found = main.get_command(CONTEXT, name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    assert command(name).get_short_help_str()
    assert f"edgepeft {name} " in (command(name).help or "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    options = [item for item in command(name).params if isinstance(item, click.Option)]
    assert all(option.help for option in options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_quick_start(name):
    assert f"edgepeft {name}" in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def test_the_command_reference_is_current():
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generator.cli_reference(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in headings(linked), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_index_of_decisions_lists_every_page():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[.+?\]\((\w+\.md)\): ", index, flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in folder.glob("*.md") if page.name != "README.md")


def tree(error: type[errors.EdgePeftError] = errors.EdgePeftError) -> list[type[errors.EdgePeftError]]:
    """An error and all that derive from it, in the order of their definitions."""
    return [error, *(below for child in error.__subclasses__() for below in tree(child))]


def test_every_error_is_in_the_troubleshooting_page():
    """A section each, with its exit code, and the tree as it is."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+Error)\n\n(.+?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert sections.keys() == {error.__name__ for error in tree()}
    for error in tree():
        assert sections[error.__name__].startswith(f"*Exit code {error.exit_code}"), error.__name__
    drawn = re.findall(r"^([│ ├└─]*)(\w+Error)$", page, flags=re.MULTILINE)
    assert drawn == re.findall(r"^    ([│ ├└─]*)(\w+Error)", errors.__doc__ or "", flags=re.MULTILINE)
    assert [name for _, name in drawn] == [error.__name__ for error in tree()]


def literal_texts() -> str:
    """What stands between quotes in the code, formatted values left out as `…`."""
    texts = []
    for folder in ("edgepeft", "runtime", "exporters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                values = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
                texts += ["".join(map(str, values))] if any(isinstance(part, str) for part in values) else []
    return "\n".join(texts)


def test_the_messages_that_the_troubleshooting_page_quotes_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = literal_texts()
    quoted = [
        (message, part.strip(" :,"))
        for cell in re.findall(r"^\| (`.+?) \| ", page.partition("## UsageError")[2], flags=re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", cell)
        for part in message.split("…")
    ]
    assert len(quoted) > 100
    assert [message for message, part in quoted if part not in said] == []


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "docs-site", "wheel"])
def test_make_targets_that_the_readme_or_contributing_name_exist(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    assert f"\n{target}:" in makefile
    assert f"make {target}" in pages
