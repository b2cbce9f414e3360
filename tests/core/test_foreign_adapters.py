"""Adapters of other programs, and what is mistaken for one, are named with what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgepeft.adapters import load_adapter
from edgepeft.errors import AdapterError


def tensors(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, path)
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def mlx(folder: Path) -> Path:
    settings = {"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": {"rank": 8, "scale": 20.0}}
    text(folder / "adapter_config.json", json.dumps(settings))
    return tensors(folder / "adapters.safetensors", "model.layers.0.self_attn.q_proj.lora_a").parent


def checkpoints(folder: Path) -> Path:
    text(folder / "checkpoint-500" / "adapter_config.json", "{}")
    return folder


GGUF, MLX, KOHYA = (
    "an adapter of llama.cpp",
    "an adapter of mlx-lm: fuse it",
    "an adapter of a diffusion model",
)
UNET, PEFT = "lora_unet_down_blocks_0.lora_down.weight", "base_model.model.q.lora_A.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (mlx, MLX),
        (lambda f: tensors(f / "x.safetensors", "model.layers.0.q_proj.lora_b"), MLX),
        (lambda f: text(f / "lora.gguf", b"GGUF" + bytes(20)), GGUF),
        (lambda f: text(f / "lora.bin", b"GGUF" + bytes(20)), GGUF),
        (lambda f: text(f / "lora.gguf", b"GGUF").parent, GGUF),
        (lambda f: tensors(f / "style.safetensors", UNET), KOHYA),
        (lambda f: tensors(f / "style.safetensors", UNET).parent, KOHYA),
        (lambda f: tensors(f / "adapter_model.safetensors", PEFT), "give the folder"),
        (lambda f: text(f / "adapter_model.bin", b"PK"), "is a pickle, which is never opened"),
        (lambda f: text(f / "config.json", "{}").parent, "is a whole model, no adapter: export it as MODEL"),
        (lambda f: text(f / "manifest.json", "{}").parent, "is a bundle"),
        (checkpoints, r"holds adapters in folders of its own \(checkpoint-500\): give one"),
    ],
)  # fmt: skip
def test_it_is_named_with_what_to_do(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = make(tmp_path / "given")
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_damaged_or_strange_is_told_by_what_opens_it(tmp_path: Path) -> None:
    """No traceback of what only looked at it."""
    for name, content in (
        ("adapter_config.json", b"[1]"),
        ("adapter_config.json", b"\xff"),
        ("x.safetensors", b"x"),
    ):
        folder = text(tmp_path / name.replace(".", "_") / name, content).parent
        with pytest.raises(AdapterError):
            load_adapter(folder)
