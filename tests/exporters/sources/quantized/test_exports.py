"""Checkpoints that are quantized already through the export: bundles with their codes, against PyTorch.

The export's own verification compares with the model that was read; here the model is made of what the
writers drew.
"""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import edgepeft
from edgepeft.errors import UsageError

from ... import models
from . import writers
from .cases import CASES, COSINE, NF4, OUTPUT, draw_table, measured
from .test_checkpoint import AWQ

FAST = ("GGUF Q4_K", "GPTQ, act-order", "MLX", "bitsandbytes NF4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_a_bundle_answers_and_learns_as_pytorch_does(name: str, tmp_path: Path) -> None:
    figures = measured(CASES[name], tmp_path)
    assert figures.output <= OUTPUT
    assert figures.cosine >= COSINE
    assert figures.gradients == 14  # of seven linears in two layers, B of each


def test_an_adapter_of_peft_fits_the_codes_that_it_was_trained_on(tmp_path: Path) -> None:
    """QLoRA's case: a LoRA over NF4, whose base the device has bit for bit."""
    model = models.llama(tied=True)
    expected = writers.quantized_llama(tmp_path / "model", draw_table("nf4", nested=True), NF4, model)
    for parameter, value in expected.items():
        model.get_parameter(parameter).data = value
    adapter = models.save_adapter(
        model, tmp_path / "qlora", 1, r=4, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    edgepeft.export(str(tmp_path / "model"), tmp_path / "bundle", adapters={"mine": adapter})
    batch = models.batch(labels="tokens")
    inputs = {key: value for key, value in batch.arrays.items() if key != "labels"}
    wrapped = peft.PeftModel.from_pretrained(model, adapter).eval()
    with edgepeft.load(tmp_path / "bundle") as device, torch.no_grad():
        (got,) = device.forward(inputs, adapter="mine").values()
        logits = wrapped(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits
    counted = batch.arrays["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[counted], logits.numpy()[counted], rtol=0, atol=1e-4)


def test_bits_round_what_the_codes_stand_for_once_more(tmp_path: Path) -> None:
    writers.quantized_llama(tmp_path / "model", writers.draw_awq(), AWQ, models.llama(tied=True))
    manifest = edgepeft.export(
        str(tmp_path / "model"), tmp_path / "bundle", rank=4, bits=8, train=False, verify=False
    )
    assert manifest.quantization.bits == 8
    with pytest.raises(UsageError, match="quantized already and stay as they are: leave it out"):
        edgepeft.export(str(tmp_path / "model"), tmp_path / "other", calibration=[{"text": "a"}])
    assert not (tmp_path / "other").exists()
