"""Training on the device against the same in PyTorch + PEFT, step by step, and the way back to PEFT."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.runtime.training.sampling import batch_indices, split

from .. import models, task_models
from ..conftest import Exported

Make = Callable[[str, int], Exported]
STEPS, BATCH, SEED = 100, 8, 3
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM, WARMUP = 2e-3, 0.01, 1.0, 5


def records(kind: str) -> list[dict[str, Any]]:
    """Learnable records: the first token tells the label; a sequence repeats a short phrase; a picture is
    noise around a mean that tells the label."""
    rng = np.random.default_rng(7)
    made: list[dict[str, Any]] = []
    for index in range(48):
        if kind == "vit":
            pixels = 0.5 * rng.standard_normal((3, 16, 16)) + index % 3 - 1
            made.append({"pixel_values": pixels.astype(np.float32), "label": index % 3})
            continue
        length = int(rng.integers(4, 12))
        if kind == "bert-classifier":
            ids = rng.integers(10, models.SIZES["vocab_size"], length)
            ids[0] = index % 3
            made.append({"input_ids": ids.tolist(), "label": index % 3})
        else:
            phrase = (np.arange(length) * 3 + index % 4) % 40 + 10
            made.append({"input_ids": phrase.tolist(), "labels": phrase.tolist()})
    return made


def padded(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as a PyTorch user pads it."""
    if "pixel_values" in chosen[0]:
        return {
            "pixel_values": torch.from_numpy(np.stack([record["pixel_values"] for record in chosen])),
            "labels": torch.tensor([record["label"] for record in chosen]),
        }
    width = max(len(record["input_ids"]) for record in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, record in enumerate(chosen):
        count = len(record["input_ids"])
        ids[row, :count] = torch.tensor(record["input_ids"])
        mask[row, :count] = 1
        if "labels" in record:
            labels[row, :count] = torch.tensor(record["labels"])
    if "label" in chosen[0]:
        labels = torch.tensor([record["label"] for record in chosen])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def torch_losses(
    model: torch.nn.Module,
    data: list[dict[str, Any]],
    steps: int = STEPS,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """AdamW, or another optimizer, with warm-up, linear decay and clipping, as the transformers Trainer does
    it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, steps)
    classes = np.array([record["label"] for record in data]) if "label" in data[0] else None
    train_on, _ = split(len(data), 0.1, SEED, classes=classes)
    kinds = None if classes is None else classes[train_on]
    forward, allocate = model, None
    if isinstance(model, peft.PeftModel) and isinstance(model.base_model, peft.AdaLoraModel):
        forward = model.base_model  # without a task type, PEFT goes around its own term of the loss
        if model.peft_config["default"].rank_pattern is None:
            allocate = model.base_model.update_and_allocate
    losses = []
    for step in range(steps):
        indices = batch_indices(len(train_on), BATCH, SEED, step, classes=kinds)
        chosen = [data[train_on[index]] for index in indices]
        loss = forward(**padded(chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        if allocate is not None:
            allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def step_by_step(bundle: Path, copy: Path) -> Path:
    """The bundle with a policy that bounds an update, far away, so that no head is fitted in closed form."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["policy"]["max_relative_change"] = 1e6
    (copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return copy


@pytest.mark.parametrize("name", ["bert-classifier", "llama-tied", "vit"])
def test_a_hundred_steps_follow_pytorch_and_the_adapter_returns_to_peft(
    exported: Make, name: str, tmp_path: Path
) -> None:
    bundle = exported(name, 32)
    data = records(name)
    model = peft.PeftModel.from_pretrained(
        bundle.torch_model(), bundle.adapters["plain"], is_trainable=True
    ).eval()
    expected = torch_losses(model, data)

    output = tmp_path / "adapted"
    with edgepeft.load(step_by_step(bundle.folder, tmp_path / "b"), memory_budget="2GiB") as device:
        report = device.adapt(
            data,
            output,
            adapter="plain",
            steps=STEPS,
            batch_size=BATCH,
            seq_len=None if name == "vit" else 16,
            seed=SEED,
            warmup_steps=WARMUP,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
        )
        np.testing.assert_allclose(report.losses, expected, rtol=0.01)
        assert np.mean(expected[-5:]) < 0.8 * np.mean(expected[:5]), (
            "nothing was learned, so nothing was compared"
        )

        batch = models.batch()
        if name == "vit":
            batch = models.Batch({"pixel_values": task_models.batch("vit")["pixel_values"]})
        (on_device,) = device.forward(batch.arrays, adapter=output).values()
    recorded = load_adapter(output).base
    assert recorded is not None
    assert recorded == bundle.manifest.base
    # PEFT says nothing of it: a warning would be an error here.
    reopened = peft.PeftModel.from_pretrained(bundle.torch_model(), output).eval()
    with torch.no_grad():
        in_peft = reopened(**batch.tensors).logits.numpy()
    counted = batch.arrays["attention_mask"].astype(bool) if in_peft.ndim == 3 else slice(None)
    np.testing.assert_allclose(on_device[counted], in_peft[counted], rtol=0, atol=1e-4)
    trained = {key: value.detach() for key, value in peft.get_peft_model_state_dict(model).items()}
    for key, value in peft.get_peft_model_state_dict(reopened).items():
        torch.testing.assert_close(value, trained[key], rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_a_thousand_steps_in_stages_follow_pytorch_in_flat_memory(exported: Make, tmp_path: Path) -> None:
    """On the 4-bit base that PyTorch gets decoded; at the end no more is held than at the beginning."""
    bundle = exported("llama-tied", 4)
    rng = np.random.default_rng(11)
    data = [{"input_ids": rng.integers(10, models.SIZES["vocab_size"], 16).tolist()} for _ in range(400)]
    for record in data:
        record["labels"] = record["input_ids"]
    model = peft.PeftModel.from_pretrained(
        bundle.torch_model(), bundle.adapters["plain"], is_trainable=True
    ).eval()
    expected = torch_losses(model, data, 1000)
    held: list[int] = []
    with edgepeft.load(bundle.folder, memory_budget="4GiB") as device:
        report = device.adapt(
            data,
            tmp_path / "adapted",
            on_step=lambda step: held.append(step.resident_bytes),
            adapter="plain",
            strategy="streamed",
            steps=1000,
            batch_size=BATCH,
            seq_len=16,
            seed=SEED,
            warmup_steps=WARMUP,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
        )
    np.testing.assert_allclose(report.losses, expected, rtol=0.02)
    assert np.mean(expected[-50:]) < 0.97 * np.mean(expected[:50]), "nothing was learned"
    assert max(held[-100:]) <= 1.02 * max(held[100:200])
