"""Who may import whom, looked up in the modules that a fresh process has loaded."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import networkx
import pytest

ROOT = Path(__file__).parents[1]
WORKSTATION = {
    "torch",
    "transformers",
    "peft",
    "optimum",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "safetensors.torch",
}
TEXT = {"tokenizers", "jinja2", "PIL"}


def loaded_after(code: str) -> set[str]:
    """Names of the modules that are loaded once `code` has run in a process of its own."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_runtime_leaves_the_workstation_out() -> None:
    """No torch, no onnx, and no tokenizers until there is text."""
    loaded = loaded_after("import edgepeft.runtime, edgepeft.runtime.training.adapt")
    assert "onnxruntime" in loaded
    assert not loaded & (WORKSTATION | TEXT)
    assert not any(name.startswith("edgepeft.exporters") for name in loaded)


def test_the_core_leaves_onnxruntime_out() -> None:
    """numpy is all it costs, and not even that for the name alone."""
    everything = (
        "import edgepeft, edgepeft.adapters, edgepeft.bundle.reader, edgepeft.bundle.writer, edgepeft.sizes\n"
        "import edgepeft.cli, importlib\n"
        "for name in edgepeft.cli.COMMANDS: importlib.import_module('edgepeft.cli.' + name)"
    )
    loaded = loaded_after(everything)
    assert not loaded & (WORKSTATION | TEXT | {"onnxruntime"})
    assert not any(name.startswith(("edgepeft.runtime", "edgepeft.exporters")) for name in loaded)
    assert "numpy" not in loaded_after("import edgepeft")


def test_a_whole_update_never_loads_the_workstation(tmp_path: Path) -> None:
    """Opening, training, judging, saving and predicting."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import edgepeft, json
recs = json.loads({json.dumps(json.dumps(_records()))})
with edgepeft.load({str(_bundle(tmp_path))!r}, memory_budget="4GiB") as model:
    model.adapt(recs, {str(tmp_path / "out")!r}, steps=12, learning_rate=0.05)
    model.predict(recs, adapter={str(tmp_path / "out")!r})
"""
    assert not loaded_after(code) & (WORKSTATION | TEXT)


#: What generation and other tasks need, and what the standard library brings along where nobody looks.
UNUSED = (
    "edgepeft.runtime.generation",
    "edgepeft.runtime.text.chat",
    "edgepeft.runtime.preprocessing",
    "edgepeft.runtime.adapters.onnx_adapter",
    "edgepeft.runtime.bench",
    "edgepeft.runtime.tasks.embedding",
    "importlib.metadata",
    "statistics",
    "email",
    "http",
    "socket",
    "wave",
)


def test_an_update_loads_nothing_of_generation(tmp_path: Path) -> None:
    """Every module is memory that the budget counts; and generation loads nothing of training."""
    opened = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import edgepeft, json
with edgepeft.load({str(_bundle(tmp_path))!r}, memory_budget="4GiB") as model:
"""
    adapted = loaded_after(f"""{opened}
    recs = json.loads({json.dumps(json.dumps(_records()))})
    model.adapt(recs, {str(tmp_path / "out")!r}, steps=12, learning_rate=0.05)
""")
    assert not [name for name in adapted if name.startswith(UNUSED)]
    ran = loaded_after(f"""{opened}
    model.forward({{"input_ids": [[1, 2, 3]]}})
""")
    unneeded = (*UNUSED, "edgepeft.runtime.training.adapt", "edgepeft.runtime.training.gradients")
    assert not [name for name in ran if name.startswith(unneeded)]


def _records() -> list[dict[str, object]]:
    from .runtime import tiny

    return tiny.records()


def _bundle(folder: Path) -> Path:
    from .runtime import tiny

    return tiny.write_bundle(folder / "tiny.edge")


ALLOWED = {
    "edgepeft": {"numpy", "click", "safetensors", "edgepeft"},
    "runtime": {"numpy", "onnxruntime", "edgepeft", "tokenizers", "jinja2", "matplotlib", "PIL", "psutil"},
}
#: What not every system has, and the only file that may ask for it.
SYSTEMS_OWN, ASKING = (
    {"resource", "psutil", "fcntl", "pwd", "grp", "termios", "winreg", "msvcrt"},
    "system.py",
)


@pytest.mark.parametrize("folder", ["edgepeft", "runtime", "exporters"])
def test_imports_follow_the_house_rules(folder: str) -> None:
    """By reading every import statement, also those inside functions."""
    for path in (ROOT / folder).rglob("*.py"):
        lazy = path.relative_to(ROOT).parts[:2] in {("edgepeft", "cli"), ("edgepeft", "__init__.py")}
        for module in _imports(path):
            top = module.split(".")[0]
            assert top not in SYSTEMS_OWN or path.name == ASKING, f"{path} imports {module}"
            if folder != "exporters":
                assert top in ALLOWED[folder] or top in sys.stdlib_module_names, f"{path} imports {module}"
            if folder == "edgepeft" and not lazy:
                assert not module.startswith(("edgepeft.runtime", "edgepeft.exporters")), (
                    f"{path} imports {module}"
                )
            if folder == "runtime":
                assert not module.startswith("edgepeft.exporters"), f"{path} imports {module}"
            if folder == "exporters" and module.startswith("edgepeft.runtime"):
                room = path.relative_to(ROOT / "exporters").parts[0].removesuffix(".py")
                assert room in {"calibration", "measure", "shrink", "verify"}, f"{path} imports {module}"


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def _rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_rooms", ROOT / "docs" / "generate_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("package", ["exporters", "runtime"])
def test_imports_go_down_the_rooms_of_the_architecture_page(package: str) -> None:
    """Every room is listed, none that is gone, and the drawing shows today's imports."""
    rooms = _rooms()
    order = rooms.listed(rooms.PAGE.read_text("utf-8"))[package]
    found = rooms.arrows(package)
    assert rooms.wrong(order, found) == []
    assert set(order) == {
        path.stem for path in (ROOT / package).iterdir() if path.stem.strip("_") == path.stem
    }
    assert (rooms.ASSETS / f"{package}.svg").read_text("utf-8") == rooms.drawing(order, found), (
        "run: make docs"
    )


def test_folders_that_both_sides_share_do_not_import_each_other_in_a_circle() -> None:
    graph = networkx.DiGraph(_rooms().arrows("edgepeft"))
    assert list(networkx.simple_cycles(graph)) == []


def test_an_import_that_goes_up_is_found() -> None:
    assert _rooms().wrong(["top", "bottom"], {("top", "bottom"), ("bottom", "top"), ("top", "new")}) == [
        ("bottom", "top"),
        ("top", "new"),
    ]


@pytest.mark.parametrize("package", ["exporters", "runtime", "edgepeft"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Also not for a type alone."""
    rooms = _rooms()
    graph = networkx.DiGraph()
    for path in (ROOT / package).rglob("*.py"):
        if path.name != "__init__.py":
            own = rooms.dotted(path)
            graph.add_edges_from((".".join(own), module) for module in rooms.imported(path, own))
            graph.add_edges_from(
                (".".join(own), module.rpartition(".")[0]) for module in rooms.imported(path, own)
            )
    circles = [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    assert circles == []
