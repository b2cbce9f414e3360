"""Who may import whom, looked up in the modules that a fresh process has loaded."""

import ast
import json
import subprocess
import sys
from pathlib import Path

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
    "edgepeft.runtime.generat",
    "edgepeft.runtime.decoding",
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
    unneeded = (*UNUSED, "edgepeft.runtime.training.adapt", "edgepeft.runtime.training.gradients.chain")
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
                assert path.name in {
                    "calibration_records.py",
                    "verify.py",
                    "verify_batch.py",
                    "verify_decoder.py",
                    "verify_generation.py",
                    "verify_reference.py",
                    "verify_text.py",
                    "verify_file.py",
                    "verify_stages.py",
                    "verify_streamed.py",
                    "inference_memory.py",
                    "chain_memory.py",
                    "probe.py",
                }, f"{path} imports {module}"


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found
