"""LoRA whose initialization changed the base: exported, they compute what PEFT does; converted by it, too."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file

import edgepeft
from edgepeft.errors import AdapterError
from edgepeft.exporters.options import ExportOptions
from edgepeft.exporters.sources.open import opened_source
from edgepeft.exporters.techniques.prepare import read_adapters, read_others

from .. import models
from . import parity

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    pytest.mark.filterwarnings("ignore:.* changes the base weights of the model and should thus not be used"),
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # of a Conv1D
]
MODELS: Mapping[str, Callable[[], Any]] = {**parity.FAMILIES, "gpt2": models.gpt2}


def config(family: str, **options: Any) -> peft.LoraConfig:
    """A LoRA on two linears of the family."""
    targets = {
        "llama": ["v_proj", "down_proj"],
        "bert": ["value", "output.dense"],
        "gpt2": ["c_attn", "c_fc"],
    }
    return peft.LoraConfig(
        **{"r": 4, "target_modules": targets[family], "task_type": parity.TASK_TYPES.get(family)} | options
    )


def trained(model: Any, settings: peft.LoraConfig, start: Path | None = None) -> peft.PeftModel:
    """`model` wrapped, with noise on each factor as if it had been trained; `start` gets it as it began."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, settings)
    if start is not None:
        wrapped.save_pretrained(str(start))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return wrapped.eval()


def logits(model: Any) -> torch.Tensor:
    model.config.use_cache = False
    with torch.no_grad():
        found: torch.Tensor = model(**models.batch().tensors).logits
    return found


def difference(bundle: Path, adapter: str | None, expected: torch.Tensor) -> float:
    """The largest, relative to the largest magnitude."""
    given = models.batch().arrays
    with edgepeft.load(bundle) as device:
        (got,) = device.forward(given, adapter=adapter).values()
    counted = given["attention_mask"] == 1 if expected.ndim == 3 else slice(None)
    theirs = expected.numpy()[counted]
    return float(np.abs(got[counted] - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
        ("llama", {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}}),
        ("bert", {"init_lora_weights": "pissa", "modules_to_save": ["classifier"]}),
        ("gpt2", {"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"c_fc": 3}}),
    ],
)
def test_as_an_adapter_it_computes_what_peft_does(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """As the folder lies on a hub, over the base that it began from; and what was trained said the same."""
    model = trained(MODELS[family](), config(family, **options))
    said = logits(model)
    model.save_pretrained(str(tmp_path / "a"))
    opened = logits(peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path / "a")))
    torch.testing.assert_close(opened, said, rtol=1e-4, atol=1e-4)
    manifest = edgepeft.export(
        MODELS[family](), tmp_path / "b", bits=32, adapters={"a": tmp_path / "a"}, quick=True
    )
    assert manifest.verification is not None
    assert difference(tmp_path / "b", "a", opened) <= 1e-4
    assert difference(tmp_path / "b", None, logits(MODELS[family]())) <= 1e-4
    assert difference(tmp_path / "b", None, opened) > 1e-2


@pytest.mark.parametrize("initialization", ["pissa", "olora"])
def test_it_is_what_peft_converts_it_to(initialization: str, tmp_path: Path) -> None:
    """To the tensor, but for the directions that a decomposition leaves open: their products."""
    settings = config("llama", init_lora_weights=initialization)
    model = trained(MODELS["llama"](), settings, tmp_path / "start")
    model.save_pretrained(str(tmp_path / "a"))
    model.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    read = read_adapters(ExportOptions(adapters={"a": tmp_path / "a"}))
    with opened_source(MODELS["llama"](), task=None, labels=None, seed=0) as source:
        ours = read_others(read, source, tmp_path / "scratch").loaded["a"]
    theirs = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    said = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "init_lora_weights"):
        assert ours.config[name] == said[name]
    assert ours.tensors.keys() == theirs.keys()
    for key in (key for key in theirs if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        np.testing.assert_allclose(
            ours.tensors[other] @ ours.tensors[key], theirs[other] @ theirs[key], rtol=0, atol=1e-5
        )


def converted(initialization: str, tmp_path: Path) -> tuple[torch.Tensor, Path]:
    """What a trained model says, and the adapter as PEFT's own conversion writes it."""
    corda = CordaConfig(corda_method="kpm") if initialization == "corda" else None
    model = MODELS["llama"]()
    settings = config("llama", init_lora_weights=initialization, corda_config=corda)
    if corda is not None:
        preprocess_corda(model, settings, run_model=lambda: model(torch.arange(48)[None]))
    wrapped = trained(model, settings, tmp_path / "start")
    wrapped.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    return logits(wrapped), tmp_path / "plain"


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_as_pefts_conversion_writes_it(initialization: str, tmp_path: Path) -> None:
    said, folder = converted(initialization, tmp_path)
    edgepeft.export(
        MODELS["llama"](), tmp_path / "b", bits=32, adapters={"a": folder}, quick=True, train=False
    )
    assert difference(tmp_path / "b", "a", said) <= 1e-4


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_4", "olora"])
def test_over_the_base_that_it_left(initialization: str, tmp_path: Path) -> None:
    """The other remedy: its base is quantized then as it is, and the adapter goes on where it began."""
    model = trained(MODELS["llama"](), config("llama", init_lora_weights=initialization))
    said = logits(model)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "a"))
    edgepeft.export(
        model.unload(), tmp_path / "b", bits=32, adapters={"a": tmp_path / "a"}, quick=True, train=False
    )
    assert difference(tmp_path / "b", "a", said) <= 1e-4


@pytest.mark.parametrize("as_folder", [False, True])
def test_as_the_model_it_is_merged_into_the_base_that_it_changed(as_folder: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    MODELS["llama"]().save_pretrained(base)
    loaded = MODELS["llama"]().from_pretrained(base)
    model = trained(loaded, config("llama", init_lora_weights="pissa"))
    said = logits(model)
    model.save_pretrained(str(tmp_path / "a"))
    edgepeft.export(
        tmp_path / "a" if as_folder else model, tmp_path / "b", bits=32, targets=[], quick=True, train=False
    )
    assert difference(tmp_path / "b", None, said) <= 1e-4


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("pissa_niter_4", "path_initial_model_for_weight_conversion=START"),
        ("corda", "path_initial_model_for_weight_conversion=START"),
        ("lora_ga", r"model\.unload\(\)"),
        ("loftq", r"rounded by LoftQ: export the base that it was trained over \(model\.unload\(\)\)"),
        ("something", "train the adapter without it"),
    ],
)
def test_others_are_refused_with_the_remedy(value: str, remedy: str, tmp_path: Path) -> None:
    """PEFT draws PiSSA's fast decomposition anew when it opens the folder, cannot open CorDA's and LoftQ's,
    and leaves LoRA-GA's base as it was: none of them is what was trained."""
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    model = trained(MODELS["llama"]().from_pretrained(tmp_path / "base"), config("llama"))
    model.save_pretrained(str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": value}))
    with pytest.raises(AdapterError, match=f"init_lora_weights='{value}' is not supported.*{remedy}"):
        edgepeft.export(MODELS["llama"](), tmp_path / "b", adapters={"a": tmp_path / "a"})
    with pytest.raises(AdapterError, match=f"init_lora_weights='{value}' is not supported.*{remedy}"):
        edgepeft.export(tmp_path / "a", tmp_path / "b")


def test_a_device_refuses_what_it_has_no_float_weights_for(tmp_path: Path) -> None:
    model = trained(MODELS["llama"](), config("llama", init_lora_weights="pissa"))
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match="give it to export, or save it as a plain LoRA with PEFT's"):
        edgepeft.adapters.load_adapter(tmp_path / "a")
