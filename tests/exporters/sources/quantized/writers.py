"""Quantized checkpoints as their own libraries write them, made of codes that are drawn.

What a code stands for is computed of the drawn numbers by each format's formula, without the exporter.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

#: Where AWQ's words have the codes of eight neighbours, from the lowest four bits up.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass
class Drawn:
    """A module's tensors, by the part of their names behind its own, and the weight that they stand for."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor


Draw = Callable[[int, int, np.random.Generator], Drawn]


def words(codes: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words `[n, m * bits / 32]` of `[n, m]`, by arithmetic on Python's integers."""
    each = 32 // bits
    places = places or tuple(range(each))
    rows = []
    for row in codes.tolist():
        row += [0] * (-len(row) % each)
        rows.append(
            [
                sum(code * 2 ** (bits * places[i]) for i, code in enumerate(row[first : first + each]))
                for first in range(0, len(row), each)
            ]
        )
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def per_group(
    codes: np.ndarray, groups: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float
) -> torch.Tensor:
    """`(codes - zeros) * scales` `[N, K]`, with the scales and zeros `[N, groups]` of each column's group."""
    spread = zeros[:, groups] if isinstance(zeros, np.ndarray) else zeros
    return torch.from_numpy((codes - spread).astype(np.float32) * scales.astype(np.float32)[:, groups])


def draw_gptq(
    bits: int = 4, group_size: int = 32, *, version: int = 1, sym: bool = True, act_order: bool = False
) -> Draw:
    """GPTQ; a zero that is not symmetric may be 0, which version 1 borrows for."""

    def draw(rows: int, columns: int, rng: np.random.Generator) -> Drawn:
        size = columns if group_size == -1 else group_size
        count = -(-columns // size)
        groups = np.arange(columns) // size
        if act_order:
            # By what the columns read: linears of one input have one order.
            groups = np.random.default_rng(columns).permutation(groups)
        codes = rng.integers(0, 2**bits, (rows, columns))
        scales = rng.uniform(0.01, 0.02, (rows, count)).astype(np.float16)
        zeros = np.full((rows, count), 2 ** (bits - 1))
        if not sym:
            zeros = rng.integers(0, 2**bits, (rows, count))
        packed = words(zeros.T, bits)
        if version == 1:
            packed = packed - int(words(np.ones((1, 32 // bits), int), bits))
        tensors = {
            "qweight": words(codes, bits).T,
            "qzeros": packed,
            "scales": torch.from_numpy(scales.T),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        return Drawn(tensors, per_group(codes, groups, scales, zeros))

    return draw


def draw_awq(group_size: int = 32) -> Draw:
    """AWQ for "gemm"."""

    def draw(rows: int, columns: int, rng: np.random.Generator) -> Drawn:
        count = columns // group_size
        codes = rng.integers(0, 16, (rows, columns))
        zeros = rng.integers(0, 16, (rows, count))
        scales = rng.uniform(0.01, 0.02, (rows, count)).astype(np.float16)
        tensors = {
            "qweight": words(codes.T, 4, AWQ_PLACES),
            "qzeros": words(zeros.T, 4, AWQ_PLACES),
            "scales": torch.from_numpy(scales.T),
        }
        return Drawn(tensors, per_group(codes, np.arange(columns) // group_size, scales, zeros))

    return draw


def draw_mlx(bits: int = 4, group_size: int = 32) -> Draw:
    """mlx-lm, with the floats of a bfloat16 model."""

    def draw(rows: int, columns: int, rng: np.random.Generator) -> Drawn:
        count = columns // group_size
        codes = rng.integers(0, 2**bits, (rows, columns))
        scales, biases = (
            torch.from_numpy(rng.uniform(low, 0.02, (rows, count))).bfloat16() for low in (0.01, -0.2)
        )
        groups = np.arange(columns) // group_size
        weight = per_group(codes, groups, scales.float().numpy(), 0) + biases.float()[:, groups]
        tensors = {"weight": words(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
        return Drawn(tensors, weight)

    return draw


def quantized_llama(
    folder: Path,
    draw: Draw,
    settings: Mapping[str, Any],
    model: transformers.PreTrainedModel,
    *,
    key: str = "quantization_config",
    also: tuple[str, ...] = (),
    shard: bool = False,
    note: str | None = None,
) -> dict[str, torch.Tensor]:
    """Write `model` with the weights of its layers' linears (and of the modules `also`) drawn anew, each with
    a `note` in the file's head.

    Returns:
        All parameters of the model that the folder is to be read as.
    """
    rng = np.random.default_rng(0)
    stored = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    expected = {name: tensor.float() for name, tensor in stored.items()}
    notes = {}
    for name, module in model.named_modules():
        linear = ".layers." in name and isinstance(module, torch.nn.Linear)
        if not linear and name not in also:
            continue
        drawn = draw(*module.weight.shape, rng)
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in drawn.tensors.items()}
        expected[f"{name}.weight"] = drawn.weight
        if note is not None:
            notes[f"{name}.weight"] = note
    write(folder, stored, described(model) | {key: dict(settings)}, shard=shard, notes=notes)
    return expected


def described(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """config.json of a model."""
    return model.config.to_dict() | {"architectures": [type(model).__name__]}


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    shard: bool = False,
    notes: Mapping[str, str] | None = None,
) -> None:
    """A folder with config.json and safetensors, in two files with an index where it is to be sharded, or
    with `notes` in the head of the only one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if not shard:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt", **(notes or {})})
        return
    places = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
