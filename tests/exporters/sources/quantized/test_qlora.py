"""QLoRA's case on a real model: a LoRA that PEFT trains over bitsandbytes' NF4, on the bundle of that folder.

`make test-formats` runs it, in an environment that has bitsandbytes.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import edgepeft
from samples.smollm2 import smollm2

pytestmark = pytest.mark.slow


def test_a_lora_that_was_trained_over_nf4_has_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="make test-formats installs it")
    tokenizer = save_floats(tmp_path / "float")
    model = in_nf4(tmp_path / "float")
    model.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    wrapped = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
        peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # For evaluation bitsandbytes rounds the blocks' scales to bfloat16 where the processor can multiply that.
    wrapped.train()
    texts = [text for item in vars(os).values() if len(text := item.__doc__ or "") > 200]
    before, after = train(wrapped, [tokenizer(text, return_tensors="pt") for text in texts[:8]])
    assert after < before
    wrapped.save_pretrained(tmp_path / "adapter")
    edgepeft.export(
        tmp_path / "nf4",
        tmp_path / "bundle",
        adapters={"mine": tmp_path / "adapter"},
        train=False,
        verify=False,
    )
    batch = tokenizer(texts[8], return_tensors="pt", truncation=True, max_length=32)
    with torch.no_grad():
        expected = wrapped(**batch).logits.numpy()
    with edgepeft.load(tmp_path / "bundle") as device:
        got = device.forward({name: batch[name].numpy() for name in batch}, adapter="mine")["logits"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def save_floats(folder: Path) -> Any:
    """SmolLM2-135M-Instruct of a GGUF file as float32; returns its tokenizer."""
    given: dict[str, Any] = {"gguf_file": smollm2().name}
    path = str(smollm2().parent)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **given)
    model.hf_quantizer = None  # of the file, which is decoded
    del model.config.quantization_config
    model.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(path, **given)


def in_nf4(folder: Path) -> transformers.PreTrainedModel:
    """A folder's model, quantized by bitsandbytes."""
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=how, dtype=torch.float32, device_map="cpu"
    )


def train(model: Any, batches: list[Any]) -> tuple[float, float]:
    """One step each; the loss of the first batch before and after."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def loss(batch: Any) -> torch.Tensor:
        ids = batch["input_ids"][:, :64]
        return model(input_ids=ids, labels=ids).loss

    before = loss(batches[0]).item()
    for batch in batches:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, loss(batches[0]).item()
