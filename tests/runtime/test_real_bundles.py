"""The device side on exported bundles, against transformers and PEFT: what the tiny bundles cannot show."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import edgepeft

from ..exporters import models
from ..exporters.conftest import Exported, exported, shared

__all__ = ["exported", "shared"]  # the fixtures
pytestmark = pytest.mark.slow
Make = Callable[[str, int], Exported]


def in_torch(bundle: Exported, adapter: Path, name: str = "default") -> Any:
    return peft.PeftModel.from_pretrained(bundle.torch_model(), adapter, adapter_name=name).eval()


@pytest.mark.parametrize("bits", [32, 4])
def test_generation_is_that_of_transformers(exported: Make, bits: int) -> None:
    """Greedy, with an adapter and without, prompts of several lengths."""
    bundle = exported("llama-tied", bits)
    model = in_torch(bundle, bundle.adapters["plain"])
    model.config.use_cache = True
    with edgepeft.load(bundle.folder) as device:
        for prompt in ([5], [7, 9, 11, 200], list(range(20, 31))):
            ids = torch.tensor([prompt])
            options: dict[str, Any] = {
                "max_new_tokens": 20,
                "do_sample": False,
                "attention_mask": torch.ones_like(ids),
                "pad_token_id": 0,
            }
            expected = model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()
            assert device.generate_ids(prompt, "plain", max_new_tokens=20) == expected
            with model.disable_adapter():
                expected = model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()
            assert device.generate_ids(prompt, max_new_tokens=20) == expected


def test_a_mixture_is_what_peft_computes_with_both_active(exported: Make) -> None:
    """Different ranks, rsLoRA and patterns, scaled by their weights."""
    bundle = exported("llama-tied", 32)
    model = in_torch(bundle, bundle.adapters["plain"], "plain")
    model.load_adapter(bundle.adapters["patterned"], "patterned")
    model.base_model.set_adapter(["plain", "patterned"])
    weights = {"plain": 0.7, "patterned": -0.4}
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, weight in weights.items():
                module.set_scale(name, weight)
    batch = models.batch()
    with torch.no_grad():
        expected = model(**batch.tensors).logits.numpy()
    with edgepeft.load(bundle.folder) as device:
        (got,) = device.forward(batch.arrays, adapter=weights).values()
    counted = batch.arrays["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[counted], expected[counted], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["bert-classifier", "llama-tied"])
def test_a_fresh_adapter_made_on_the_device_opens_in_peft(exported: Make, name: str, tmp_path: Path) -> None:
    """No adapter of PEFT's was its pattern, and the logits agree."""
    bundle = exported(name, 32)
    rng = np.random.default_rng(0)
    data: list[dict[str, Any]] = [
        {"input_ids": rng.integers(5, 9, 6).tolist(), "label": 1 - (index % 8 == 0)} for index in range(40)
    ]
    for record in data:  # which a model of random weights can learn
        record["input_ids"][0] = 10 + record["label"]
    with edgepeft.load(bundle.folder) as device:
        device.adapt(data, tmp_path / "fresh", rank=3, steps=30, learning_rate=5e-3, seq_len=16)
        batch = models.batch()
        (got,) = device.forward(batch.arrays, adapter=tmp_path / "fresh").values()
    with torch.no_grad():
        expected = in_torch(bundle, tmp_path / "fresh")(**batch.tensors).logits.numpy()
    counted = batch.arrays["attention_mask"].astype(bool) if expected.ndim == 3 else slice(None)
    np.testing.assert_allclose(got[counted], expected[counted], rtol=0, atol=1e-4)


def test_sentence_embeddings_learn_from_pairs(exported: Make, tmp_path: Path) -> None:
    """Sentences of one topic come closer than those of others, at 4 bits."""
    bundle = exported("bert-encoder", 4)
    rng = np.random.default_rng(0)

    def sentence(topic: int) -> list[int]:
        return np.where(rng.random(8) < 0.6, 10 + topic, rng.integers(30, 60, 8)).tolist()

    pairs = [{"anchor": sentence(index % 8), "positive": sentence(index % 8)} for index in range(72)]
    with edgepeft.load(bundle.folder) as device:
        report = device.adapt(
            pairs, tmp_path / "out", steps=60, batch_size=8, learning_rate=5e-3, seq_len=16, eval_fraction=0.2
        )
        vectors = device.predict([{"input_ids": pair["anchor"]} for pair in pairs[:8]], tmp_path / "out")
    assert report.held_out_after.loss < 0.9 * report.held_out_before.loss
    assert report.held_out_after.accuracy is None
    norms = np.linalg.norm([item["embedding"] for item in vectors], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-4)
    in_torch(bundle, tmp_path / "out")


def test_the_suggested_budget_does(exported: Make, tmp_path: Path) -> None:
    """Refused with a figure; at that figure the same update runs and stays below it."""
    bundle = exported("llama-tied", 4)
    data = tmp_path / "data.jsonl"
    rng = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": rng.integers(5, 9, 32).tolist()}) for _ in range(64)]
    data.write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "edgepeft.cli",
        "adapt",
        bundle.folder,
        "--data",
        data,
        "-o",
        tmp_path / "out",
    ]
    command += ["--batch-size", "32", "--steps", "5", "--lr", "1e-3", "--seq-len", "32", "--json", "--budget"]
    refused = subprocess.run([*map(str, command), "50MiB"], capture_output=True, text=True, check=False)
    assert refused.returncode == 3, refused.stderr
    budget = json.loads(refused.stdout)["error"]["message"].split("--budget ")[1].split(",")[0]
    done = subprocess.run([*map(str, command), budget], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["measured_peak_bytes"] <= memory["budget_bytes"]
    assert memory["measured_peak_bytes"] == pytest.approx(memory["predicted_peak_bytes"], rel=0.2)
