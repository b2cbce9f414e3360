"""Biases that train beside a LoRA: their keys are PEFT's, and a fresh adapter's option says which."""

from pathlib import Path

import peft
import pytest
from safetensors.numpy import load_file

import edgepeft
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.training.starting import fresh_adapter

from . import parity


@pytest.mark.parametrize(
    ("method", "option"), [("lora, bias all", "all"), ("lora, bias of targets", "lora_only")]
)
def test_keys_are_pefts(method: str, option: str, tmp_path: Path) -> None:
    """Of PEFT's adapter, written back; and of a fresh one, which PEFT opens with all of its biases."""
    parity.write(method, "bert", 32, tmp_path)
    theirs = load_file(tmp_path / "a" / "adapter_model.safetensors")
    given = load_adapter(tmp_path / "a")
    save_adapter(given, tmp_path / "again")
    wrapped = {key for key in theirs if ".original_module." in key or ".modules_to_save." in key}
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == theirs.keys() - wrapped
    assert any(key.endswith(".base_layer.bias") for key in theirs)

    fresh = fresh_adapter(open_bundle(tmp_path / "b"), 4, 0)
    assert fresh.config["bias"] == option
    assert fresh.config["modules_to_save"] == ["classifier"]
    save_adapter(fresh, tmp_path / "fresh")
    read = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    assert read.keys() == theirs.keys() - wrapped
    model = parity.in_torch("bert", tmp_path / "b", tmp_path / "fresh", trains=True)
    trained = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert trained.keys() >= read.keys()


def test_a_bundle_without_biases_refuses_them(tmp_path: Path) -> None:
    parity.write("lora", "bert", 32, tmp_path)
    adapter = parity.save("lora, bias of targets", "bert", tmp_path / "biased")
    with (
        edgepeft.load(tmp_path / "b") as device,
        pytest.raises(edgepeft.errors.AdapterError, match="bias is saved in the adapter, but this bundle"),
    ):
        device.forward(parity.batch("bert").arrays, adapter=adapter)
