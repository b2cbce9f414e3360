"""What stands where an adapter was expected, by its format, and what to do with it."""

import json
from collections.abc import Iterable
from pathlib import Path

from .errors import AdapterError
from .tensor_files import tensor_names

_FUSED = "fuse it into its model ({how}) and export that, or train an adapter with PEFT"
_LLAMA_CPP = (
    "is an adapter of llama.cpp (GGUF): give the PEFT folder that it was made of, or merge it into its GGUF "
    "model (llama-export-lora) and export that"
)
_MLX = "is an adapter of mlx-lm: " + _FUSED.format(how="mlx_lm.fuse --save-path DIR")
_KOHYA = (
    "is an adapter of a diffusion model (kohya or diffusers), and edgepeft runs transformers models: give a "
    "PEFT adapter of one of these"
)
_TENSORS_ONLY = "is the tensors of an adapter: give the folder that it is in, with its adapter_config.json"
#: Parts of tensors' names by which their writer is known.
_WRITERS = (
    (("lora_unet_", "lora_te", ".lora_down.", "unet."), _KOHYA),
    ((".lora_a", ".lora_b"), _MLX),
)


def foreign_format(path: Path) -> str | None:
    """What `path` is and what to do with it, to stand behind its name in a message; None where it is a PEFT
    adapter, or not known."""
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return None
    config = path / "adapter_config.json"
    if config.is_file():
        return _MLX if _is_mlx(config) else None
    files = sorted(path.iterdir())
    if (path / "manifest.json").is_file():
        return "is a bundle: give the folder of an adapter, such as one in its adapters/"
    if (path / "config.json").is_file():
        return "is a whole model, no adapter: export it as MODEL"
    inside = [file.name for file in files if (file / "adapter_config.json").is_file()]
    if inside:
        return f"holds adapters in folders of its own ({', '.join(inside[:3])}): give one of these"
    for file in files:
        if file.suffix in (".gguf", ".safetensors") and (found := _of_file(file)) is not None:
            return found
    return None


def _of_file(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError:
        return None
    if begin == b"GGUF" or path.suffix == ".gguf":
        return _LLAMA_CPP
    if path.suffix == ".safetensors":
        try:
            return _of_tensors(tensor_names(path))
        except AdapterError:  # damaged: its own message is for who opens it
            return None
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "is a pickle, which is never opened: give a PEFT folder with adapter_model.safetensors"
    return None


def _of_tensors(names: Iterable[str]) -> str:
    for parts, found in _WRITERS:
        if any(part in name for name in names for part in parts):
            return found
    return _TENSORS_ONLY


def _is_mlx(config: Path) -> bool:
    try:
        with config.open("rb") as file:
            settings = json.loads(file.read(2**20))
    except (OSError, ValueError, RecursionError):
        return False
    known = {"lora_parameters", "fine_tune_type", "lora_layers"}
    return isinstance(settings, dict) and "peft_type" not in settings and bool(known & settings.keys())
