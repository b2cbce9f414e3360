"""Adapter folders against PEFT itself, and adapters that cannot be used."""

import filecmp
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from edgepeft.adapter_fit import fit
from edgepeft.adapters import Adapter, load_adapter, rounded, save_adapter
from edgepeft.errors import AdapterError, UsageError
from edgepeft.slots import Slot
from edgepeft.techniques import lora, whole

QUERY = "bert.encoder.layer.0.attention.self.query"


def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def made_by_peft(folder: Path, **options: Any) -> peft.PeftModel:
    model = peft.get_peft_model(
        bert(),
        peft.LoraConfig(
            **{
                "task_type": "SEQ_CLS",
                "r": 4,
                "lora_alpha": 6,
                "target_modules": ["query", "dense"],
                **options,
            }
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


CONFIGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {
        "rank_pattern": {"layer.1.attention.self.query": 2, r"layer\.0\.output\.dense": 3},
        "alpha_pattern": {"query": 5, "dense": 9},
    },
    {"target_modules": "all-linear", "lora_alpha": 1},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_ranks_and_scalings_are_pefts(tmp_path: Path, options: dict[str, Any]) -> None:
    """Patterns and rsLoRA, module by module."""
    model = made_by_peft(tmp_path / "a", **options)
    adapter = load_adapter(tmp_path / "a")
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {module: (adapter.rank(module), adapter.scaling(module)) for module in adapter.modules} == theirs
    assert adapter.saved_keys == ("base_model.model.classifier.bias", "base_model.model.classifier.weight")


@pytest.mark.parametrize("options", CONFIGS)
def test_a_round_trip_is_what_peft_wrote(tmp_path: Path, options: dict[str, Any]) -> None:
    """Byte for byte, unknown configuration keys included, and PEFT opens it to the same logits."""
    model = made_by_peft(tmp_path / "a", **options).eval()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(config | {"zz_new": [1]}, indent=2, sort_keys=True)
    )
    save_adapter(load_adapter(tmp_path / "a"), tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False)
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    again = peft.PeftModel.from_pretrained(bert(), tmp_path / "b").eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_base_that_an_adapter_was_trained_on_is_recorded_beside_its_tensors(tmp_path: Path) -> None:
    """It comes back, also of rounded tensors; PEFT's configuration does not change, and PEFT opens the folder
    without a warning, which would be an error here."""
    made_by_peft(tmp_path / "a")
    plain = load_adapter(tmp_path / "a")
    assert plain.base is None
    marked = replace(plain, base="0" * 64)
    save_adapter(rounded(marked, "float16"), tmp_path / "b")
    assert load_adapter(tmp_path / "b").base == "0" * 64
    assert load_adapter(tmp_path / "b").config == plain.config
    again = peft.PeftModel.from_pretrained(bert(), tmp_path / "b")
    again.save_pretrained(tmp_path / "c")
    assert load_adapter(tmp_path / "c").base is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Adapters trained in half precision are common."""
    model = made_by_peft(tmp_path / "a").to(dtype)
    model.save_pretrained(tmp_path / "half")
    adapter = load_adapter(tmp_path / "half")
    theirs = peft.get_peft_model_state_dict(model)
    assert adapter.tensors.keys() == theirs.keys()
    for key, tensor in adapter.tensors.items():
        assert np.array_equal(tensor, theirs[key].float().numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own lora_B.bias for a broken tensor
def test_other_kinds_of_lora_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Everything that is not y += scaling * B(A(x)), as PEFT itself writes it."""
    made_by_peft(tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a")


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    """The message says what may be done."""
    config = peft.FourierFTConfig(task_type="SEQ_CLS", target_modules=["query"], n_frequency=10)
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(
        AdapterError,
        match=r"peft_type is 'FOURIERFT', edgepeft runs .*LORA.* adapters: train one of these, or merge",
    ):
        load_adapter(tmp_path / "a")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """PEFT's old format is refused with the remedy."""
    made_by_peft(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle.*safe_serialization"):
        load_adapter(tmp_path / "a")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """A small valid adapter."""
    made_by_peft(tmp_path / "made")
    return load_adapter(tmp_path / "made")


def changed(adapter: Adapter, **changes: Any) -> Adapter:
    return Adapter({**adapter.config, **changes}, adapter.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 2**40}, "r is"),
        ({"r": 5}, "gives rank 5, its lora_A has 4 rows"),
        ({"lora_alpha": "big"}, "lora_alpha is 'big'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": ["query"]}, "rank_pattern is"),
        ({"rank_pattern": {"query": 1.5}}, "1.5"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too costly"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "too costly"),
        ({"peft_type": None}, "peft_type is None"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    adapter: Adapter, change: dict[str, Any], message: str
) -> None:
    """Types, ranges and expressions that would take for ever."""
    with pytest.raises(AdapterError, match=message):
        changed(adapter, **change)


def without_b(tensors: dict[str, Any]) -> None:
    del tensors[f"base_model.model.{QUERY}.lora_B.weight"]


def without_a(tensors: dict[str, Any]) -> None:
    del tensors[f"base_model.model.{QUERY}.lora_A.weight"]


def with_nan(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.classifier.bias"] = np.array([0, np.nan, 0], np.float32)


def other_rank(tensors: dict[str, Any]) -> None:
    tensors[f"base_model.model.{QUERY}.lora_B.weight"] = np.zeros((8, 3), np.float32)


def convolution(tensors: dict[str, Any]) -> None:
    tensors[f"base_model.model.{QUERY}.lora_A.weight"] = np.zeros((4, 8, 1, 1), np.float32)


def unprefixed(tensors: dict[str, Any]) -> None:
    tensors["classifier.weight"] = np.zeros((3, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_b, f"module {QUERY} has lora_A but no lora_B"),
        (without_a, f"module {QUERY} has lora_B but no lora_A"),
        (with_nan, "classifier.bias holds NaN"),
        (other_rank, "lora_A has rank 4, lora_B rank 3"),
        (convolution, "expected .rank, in_channels, .kernel. and .out_channels, rank, 1, …. of a conv"),
        (unprefixed, "does not begin with"),
    ],
)
def test_tensors_that_do_not_belong_together(
    adapter: Adapter, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """The message names the module or the tensor."""
    tensors = dict(adapter.tensors)
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        adapter.with_tensors(tensors, "changed")


def slots_of(adapter: Adapter, wider: int = 0, labels: int | None = None) -> tuple[list[Slot], list[Slot]]:
    slots = []
    for module in adapter.modules:
        a, b = (adapter.tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        slots.append(lora.new_slot(module, a.shape[1] + wider, b.shape[0], 3))
    saved = []
    for key in adapter.saved_keys:
        own, *shape = adapter.tensors[key].shape
        saved.append(whole.new_slot("classifier", key.rsplit(".", 1)[1], (labels or own, *shape), key))
    return slots, saved


def test_an_adapter_fits_its_own_base(adapter: Adapter) -> None:
    """And one that lacks modules does as well."""
    slots, saved = slots_of(adapter)
    fit(adapter, slots + saved)
    few = {key: value for key, value in adapter.tensors.items() if "query" in key}
    fit(adapter.with_tensors(few, "few"), slots + saved)


def test_the_first_module_that_does_not_fit_is_named(adapter: Adapter) -> None:
    """Another width, an unknown module, a head for other labels, a module that may not be saved."""
    slots, saved = slots_of(adapter)
    first, second = adapter.modules[0], adapter.modules[1]
    with pytest.raises(AdapterError, match=rf"module {first} is 8 -> 8 .*, 9 -> 8 in this bundle"):
        fit(adapter, slots_of(adapter, wider=1)[0] + saved)
    with pytest.raises(AdapterError, match=f"module {second} takes no LoRA in this bundle"):
        fit(adapter, [slots[0], *slots[2:], *saved])
    with pytest.raises(
        AdapterError, match=r"module classifier: bias is \[3\] in the adapter, \[5\] in this bundle"
    ):
        fit(adapter, slots + slots_of(adapter, labels=5)[1])
    with pytest.raises(AdapterError, match=r"module classifier\.bias is saved in the adapter"):
        fit(adapter, slots)


def test_effect(adapter: Adapter) -> None:
    """Zero B and the base's own head change nothing; either alone does."""
    head = {key: adapter.tensors[key] for key in adapter.saved_keys}
    zero = {key: value * ("lora_B" not in key) for key, value in adapter.tensors.items()}
    untrained = adapter.with_tensors(zero, "untrained")
    assert adapter.has_effect(head)
    assert untrained.has_effect()
    assert not untrained.has_effect(head)
    assert not changed(adapter, lora_alpha=0).has_effect(head)


def test_a_missing_or_broken_folder(tmp_path: Path) -> None:
    """No folder, no configuration, no JSON, no tensors."""
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tmp_path / "none")
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        load_adapter(folder)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("[" * 50_000, "is not JSON"),
        (" " * 2**21, "larger"),
    ):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: cannot be read"):
        load_adapter(folder)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path: Path, adapter: Adapter) -> None:
    """A folder of something else is kept."""
    save_adapter(adapter, tmp_path / "out")
    save_adapter(adapter, tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json"):
        save_adapter(adapter, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
