"""The lists of CONTRIBUTING.md are whole: what an example of each kind needed is in the files that they name,
and in no other file of the code."""

import ast
import re
from functools import cache
from pathlib import Path

import onnx
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
CODE = ("edgepeft", "exporters", "runtime")
#: By section: examples, and what tells of one in any file.
EXAMPLES: dict[str, dict[str, str]] = {
    "Adding an operator": {
        name: rf"\b{name}\b"
        for name in (
            *("Erf", "Selu", "HardSwish", "BiasGelu", "LpPool", "ConvTranspose", "GroupNormalization"),
            *("TopK", "ReduceL1", "Atanh", "DepthToSpace"),
        )
    },
    "Adding a source": {"gguf": "(?i)gguf"},
    "Adding a task": {"token_classification": "(?i)token.?classification|token_cls"},
    "Adding a task that reads no text": {"audio_classification": "(?i)audio|wav2vec"},
    "Adding a model family": {"qwen3": "(?i)qwen3", "deit": "(?i)deit"},
}
#: A section whose lists go on from another's.
CONTINUES = {"Adding a task that reads no text": "Adding a task"}
CASES = [(section, name) for section, examples in EXAMPLES.items() for name in examples]
#: Files that name an example for a reason that another of its kind would not have.
BESIDE = {
    "gguf": {
        "edgepeft/foreign_adapters.py": "refuses adapters of llama.cpp",
        "exporters/sources/settings.py": "a key of that name in tokenizer_config.json",
        "tests/exporters/layout_table.py": "the layouts whose weights gguf itself decodes",
        "tests/exporters/sources/gguf_llama.py": "writes a file of the format",
        "tests/exporters/sources/quantized/cases.py": "a model of each of the format's layouts",
    }
}


def lists(section: str) -> tuple[set[str], set[str]]:
    """The files that each addition needs, and those that some need: what an item's parts name before their
    colons. A folder stands for a file in it."""
    guide = text(ROOT / "CONTRIBUTING.md").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    items = re.findall(r"^(\d+\.|-) (.+?)(?=^\d+\. |^- |^$|\Z)", guide, flags=re.MULTILINE | re.DOTALL)
    each, some = lists(CONTINUES[section]) if section in CONTINUES else (set[str](), set[str]())
    for mark, item in items:
        for named in re.findall(r"(`[^:]+`):\s", item):
            (some if mark == "-" else each).update(re.findall(r"`([\w./]+)`", named))
    return each, some


@cache
def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def tells(file: Path, pattern: str) -> bool:
    return re.search(pattern, text(file)) is not None


def holds(path: str, pattern: str) -> bool:
    """Whether a file, or one in a folder, is there and tells of what `pattern` finds."""
    place = ROOT / path
    files = place.rglob("*.py") if place.is_dir() else [place]
    return any(file.is_file() and tells(file, pattern) for file in files)


@pytest.mark.parametrize(("section", "name"), CASES)
def test_an_example_is_in_every_file_that_each_addition_needs(section: str, name: str) -> None:
    each, _ = lists(section)
    assert len(each) > 2
    pattern = EXAMPLES[section][name]
    assert [path for path in sorted(each) if not holds(path.replace("NAME", name), pattern)] == []


@pytest.mark.parametrize("section", EXAMPLES)
def test_files_that_some_need_have_an_example(section: str) -> None:
    _, some = lists(section)
    examples = [*EXAMPLES[section].items(), *EXAMPLES.get(CONTINUES.get(section, ""), {}).items()]
    for path in some:
        assert any(holds(path.replace("NAME", name), pattern) for name, pattern in examples), path


@pytest.mark.parametrize(("section", "name"), CASES)
def test_an_example_is_in_no_file_that_is_on_no_list(section: str, name: str) -> None:
    """Of the code, and of the tests' tables and models; a test may name what it likes."""
    each, some = lists(section)
    listed = {path.replace("NAME", name) for path in each | some} | BESIDE.get(name, {}).keys()
    folders = tuple(path for path in listed if path.endswith("/"))
    shared = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    files = [*(path for folder in CODE for path in (ROOT / folder).rglob("*.py")), *shared]
    found = {path.relative_to(ROOT).as_posix() for path in files if tells(path, EXAMPLES[section][name])}
    assert [path for path in sorted(found - listed) if not path.startswith(folders)] == []


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_beside_the_lists_is_there(name: str) -> None:
    (pattern,) = (examples[name] for examples in EXAMPLES.values() if name in examples)
    assert [path for path in BESIDE[name] if not holds(path, pattern)] == []


def test_no_model_is_treated_by_its_name() -> None:
    """transformers' model types, in capitals or not, are named where the list of families says so."""
    _, some = lists("Adding a model family")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(text(path)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.lower() in CONFIG_MAPPING_NAMES and not onnx.defs.has(node.value)  # `Clip`
    }
    assert sorted(found - some) == []
