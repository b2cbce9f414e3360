"""Checkpoints that are quantized already through the export: bundles with their codes, against PyTorch.

The export's own verification compares with the model that was read; here the model is made of what the
writers drew.
"""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import edgepeft
from edgepeft.errors import UsageError

from ... import models
from . import writers
from .test_bitsandbytes import NF4_SETTINGS, drawn_table
from .test_checkpoint import AWQ, EMBEDDING, GPTQ, HEAD, MLX


def draw_nf4(rows: int, columns: int, _: np.random.Generator) -> writers.Drawn:
    tensors, weight = drawn_table("nf4", nested=True, rows=rows, columns=columns)
    own = {name: tensor.clone() for name, tensor in tensors.items()}  # not the table that all have
    return writers.Drawn(own, torch.from_numpy(weight))


CASES: dict[str, tuple[writers.Draw, dict[str, Any], dict[str, Any]]] = {
    "gptq, act-order": (writers.draw_gptq(sym=False, act_order=True), GPTQ | {"desc_act": True}, {}),
    "gptq, output layer too": (writers.draw_gptq(), GPTQ, {"also": (HEAD,)}),
    "gptq of 8 bits": (writers.draw_gptq(8), GPTQ | {"bits": 8}, {}),
    "awq": (writers.draw_awq(), AWQ, {}),
    "mlx": (writers.draw_mlx(), MLX, {"key": "quantization", "also": (EMBEDDING,)}),
    "nf4": (draw_nf4, NF4_SETTINGS | {"bnb_4bit_quant_type": "nf4"}, {}),
}


FAST = ("gptq, act-order", "mlx", "nf4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_a_bundle_answers_and_learns_as_pytorch_does(name: str, tmp_path: Path) -> None:
    draw, settings, options = CASES[name]
    model = models.llama(tied="also" not in options or HEAD not in options["also"])
    expected = writers.quantized_llama(tmp_path / "model", draw, settings, model, **options)
    manifest = edgepeft.export(str(tmp_path / "model"), tmp_path / "bundle", rank=4)
    assert manifest.quantization.bits == settings.get("bits", 4)
    for parameter, value in expected.items():
        model.get_parameter(parameter).data = value
    batch = models.batch(labels="tokens")
    with edgepeft.load(tmp_path / "bundle") as device:
        inputs = {key: value for key, value in batch.arrays.items() if key != "labels"}
        (got,) = device.forward(inputs).values()
        counted = batch.arrays["attention_mask"].astype(bool)
        logits = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.detach()
        np.testing.assert_allclose(
            got[counted], logits.numpy()[counted], rtol=0, atol=1e-5 * float(logits.abs().max())
        )
        _, gradients = device.loss_and_gradients(batch.arrays, adapter="default")
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "bundle/adapters/default", is_trainable=True)
    wrapped(**batch.tensors).loss.backward()
    compared = 0
    for key, parameter in wrapped.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            continue
        gradient, ours = parameter.grad.numpy(), gradients[key.replace(".default.", ".")]
        cosine = (ours * gradient).sum() / (np.linalg.norm(ours) * np.linalg.norm(gradient))
        assert cosine >= 0.9999, key
        compared += 1
    assert compared == 14  # of seven linears in two layers, B of each: A's gradient is 0 while B is


def test_an_adapter_of_peft_fits_the_codes_that_it_was_trained_on(tmp_path: Path) -> None:
    """QLoRA's case: a LoRA over NF4, whose base the device has bit for bit."""
    model = models.llama(tied=True)
    settings = NF4_SETTINGS | {"bnb_4bit_quant_type": "nf4"}
    expected = writers.quantized_llama(tmp_path / "model", draw_nf4, settings, model)
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
