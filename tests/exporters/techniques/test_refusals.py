"""What adapters of small methods say that is not built, or that does not go together, is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.adapters import PREFIX, Adapter, load_adapter, save_adapter
from edgepeft.errors import AdapterError, ExportError

from .. import models
from . import parity

UP = f"{PREFIX}up"
MATRIX = np.ones((4, 6), np.float32)
CONFIGS: dict[str, dict[str, Any]] = {
    "ROAD": {"group_size": 4},
    "MISS": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 6},
}


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("ROAD", {"variant": "road_3"}, "variant is 'road_3', expected one of road_1, road_2, road_4"),
        ("ROAD", {"group_size": 3}, "group_size is 3, expected an even number"),
        ("MISS", {"init_weights": "bat"}, "init_weights='bat' is not supported"),
        ("MISS", {"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ("MISS", {"r": 0}, "r is 0, expected a whole number"),
        ("GRALORA", {"gralora_k": 3}, "r is 4, expected a multiple of gralora_k, which is 3"),
        ("GRALORA", {"hybrid_r": -1}, "hybrid_r is -1, expected a whole number"),
        ("GRALORA", {"bias": True}, "bias=True is not supported"),
        ("HRA", {"apply_GS": True}, "apply_GS=True is not supported"),
        ("HRA", {"bias": "lora_only"}, "bias='lora_only' is not supported"),
    ],
)
def test_a_configuration_is_refused_by_its_field(method: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=f"here: .*{message}"):
        Adapter({"peft_type": method} | CONFIGS[method] | setting, {}, "here")


@pytest.mark.parametrize(
    ("method", "tensors", "message"),
    [
        ("ROAD", {"road_theta": MATRIX}, "road_theta has 2 axes, expected 1"),
        ("ROAD", {"road_theta": MATRIX[0]}, "module up has no road_alpha"),
        ("MISS", {"miss_block": MATRIX[:3]}, r"miss_block is \[3, 6\], expected \[4, out_features\]"),
        ("GRALORA", {"gralora_A": MATRIX[None]}, r"gralora_A is \[1, 4, 6\], the configuration has 2 blocks"),
        ("HRA", {"hra_u": MATRIX.T}, r"hra_u is \[6, 4\], expected \[in_features, 6\]"),
    ],
)
def test_a_tensor_is_refused_by_its_key(method: str, tensors: dict[str, Any], message: str) -> None:
    found = {f"{UP}.{name}": value for name, value in tensors.items()}
    with pytest.raises(AdapterError, match=message):
        Adapter({"peft_type": method} | CONFIGS[method], found)


def test_a_lora_over_all_blocks_is_of_the_rank_that_is_said() -> None:
    found = {
        f"{UP}.gralora_A": np.ones((2, 3, 4), np.float32),
        f"{UP}.gralora_B": np.ones((2, 4, 5), np.float32),
    }
    with pytest.raises(
        AdapterError, match=r"the ranks \[0, 0\] over all blocks, the configuration gives it 3"
    ):
        Adapter({"peft_type": "GRALORA", "r": 4, "hybrid_r": 3}, found)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("road", {"group_size": 32}, "group_size is 32 in the adapter, 16 in this bundle"),
        ("gralora", {"gralora_k": 1}, "needs a slot with .* this bundle has one with"),
    ],
)
def test_other_groups_do_not_fit(method: str, setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Though the tensors may have the same shapes."""
    parity.write(method, "bert", 32, tmp_path)
    adapter = load_adapter(tmp_path / "a")
    tensors = {
        key: value.reshape(1, -1, value.shape[2]) if key.endswith("gralora_A") else value
        for key, value in adapter.tensors.items()
    }
    if method == "gralora":
        tensors |= {
            key: value.transpose(1, 0, 2).reshape(1, value.shape[1], -1)
            for key, value in adapter.tensors.items()
            if key.endswith("gralora_B")
        }
    save_adapter(Adapter(adapter.config | setting, tensors), tmp_path / "other")
    with edgepeft.load(tmp_path / "b") as device, pytest.raises(AdapterError, match=message):
        device.forward(parity.batch("bert").arrays, adapter=tmp_path / "other")


@pytest.mark.parametrize(
    ("method", "rank", "message"),
    [
        ("miss", 65, "reads 64 features, fewer than MiSS's rank of 65"),
        ("gralora", 3, "--rank 3: GraLoRA parts it in 2, expected a multiple"),
    ],
)
def test_a_rank_that_cannot_be_had_is_refused(method: str, rank: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        edgepeft.export(
            models.bert_classifier(), tmp_path / "b", method=method, rank=rank, targets=["key"], quick=True
        )
