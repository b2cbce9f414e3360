"""LoRA+ on the device against PEFT's own optimizer, step by step."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import peft.optimizers
import pytest
import torch

import edgepeft
from edgepeft.errors import UpdateRejectedError, UsageError

from ..conftest import Exported
from .test_learning import (
    BATCH,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    SEED,
    WARMUP,
    Make,
    records,
    step_by_step,
    torch_losses,
)

RATIO, STEPS = 8.0, 20


def pefts_losses(model: Any, data: list[dict[str, Any]], ratio: float) -> list[float]:
    """With PEFT's own optimizer."""
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=ratio
    )
    return torch_losses(model, data, STEPS, optimizer)


def adapted(bundle: Path, data: list[dict[str, Any]], output: Path, **options: Any) -> Any:
    """What is told of an update, kept or not."""
    settings: dict[str, Any] = {"adapter": "plain", "steps": STEPS, "batch_size": BATCH, "seed": SEED}
    settings |= {"warmup_steps": WARMUP, "learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
    with edgepeft.load(bundle, memory_budget="2GiB") as device:
        try:
            return device.adapt(data, output, **settings | options).to_dict()
        except UpdateRejectedError as error:
            return error.report


def torch_model(bundle: Exported) -> Any:
    return peft.PeftModel.from_pretrained(
        bundle.torch_model(), bundle.adapters["plain"], is_trainable=True
    ).eval()


@pytest.mark.parametrize("name", ["bert-classifier", "llama-tied"])
def test_twenty_steps_follow_pefts_optimizer(exported: Make, name: str, tmp_path: Path) -> None:
    """In one piece and in stages, and nearly with a state of 8 bits; a bias has the higher rate, too."""
    bundle, data = exported(name, 32), records(name)
    expected = pefts_losses(torch_model(bundle), data, RATIO)
    plain = pefts_losses(torch_model(bundle), data, 1.0)
    assert np.abs(np.array(plain) / expected - 1).max() > 0.02, "the ratio makes no difference"
    path = step_by_step(bundle.folder, tmp_path / "b")
    for strategy in ("resident", "streamed"):
        report = adapted(path, data, tmp_path / strategy, strategy=strategy, lora_plus_ratio=RATIO)
        np.testing.assert_allclose(report["losses"], expected, rtol=0.01)
    small = adapted(path, data, tmp_path / "8", lora_plus_ratio=RATIO, optimizer_state="8bit")
    np.testing.assert_allclose(small["losses"], expected, rtol=0.05)
    options = {"lora_plus_ratio": RATIO, "max_grad_norm": 0.0}  # in stages nothing waits for all gradients
    whole, staged = (
        adapted(path, data, tmp_path / f"{name}0", strategy=name, **options)["losses"]
        for name in ("resident", "streamed")
    )
    np.testing.assert_allclose(staged, whole, rtol=1e-3)


def test_a_ratio_of_one_is_plain_adamw(exported: Make, tmp_path: Path) -> None:
    bundle, data = exported("llama-tied", 32), records("llama-tied")
    plain = adapted(bundle.folder, data, tmp_path / "plain")
    one = adapted(bundle.folder, data, tmp_path / "one", lora_plus_ratio=1.0)
    np.testing.assert_allclose(one["losses"], plain["losses"], rtol=1e-6)


def test_it_is_refused_where_nothing_has_a_b(exported: Make, tmp_path: Path) -> None:
    bundle, data = exported("bert-classifier", 32), records("bert-classifier")
    path = step_by_step(bundle.folder, tmp_path / "b")
    with pytest.raises(UsageError, match="nothing that trains is a LoRA's B"):
        adapted(path, data, tmp_path / "a", lora_plus_ratio=4.0, trainable="modules_to_save")
    with pytest.raises(UsageError, match="forward-only has one rate for all"):
        adapted(path, data, tmp_path / "a", lora_plus_ratio=4.0, strategy="forward-only")
    with pytest.raises(UsageError, match="lora_plus_ratio is -1"):
        adapted(path, data, tmp_path / "a", lora_plus_ratio=-1.0)
