"""What stands for a model: a PEFT model, the folder of an adapter, and what is refused by its kind."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import edgepeft

from .. import models
from ..techniques.test_stored_modules import IDS, close, save, tied, untied

UNVERIFIED: dict[str, Any] = {"train": False, "verify": False, "bits": 32}
Build = Callable[[], transformers.PreTrainedModel]


def adapted(base: transformers.PreTrainedModel, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def logits(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.from_numpy(ids)).logits)


def forward(model: Any, bundle: Path, **options: Any) -> np.ndarray:
    edgepeft.export(model, bundle, **UNVERIFIED, **options)
    with edgepeft.load(bundle) as device:
        return np.asarray(device.forward({"input_ids": IDS})["logits"])


def point_to(folder: Path, base: str) -> None:
    """Note in an adapter's configuration which base it is of."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (untied, {"target_modules": ["q_proj"]}),
        (tied, {"target_modules": ["q_proj", "lm_head"]}),
        (tied, {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["embed_tokens"]}),
    ],
    ids=["lora", "tied-output", "dora"],
)
def test_a_peft_model_is_exported_as_what_it_computes(
    build: Build, config: dict[str, Any], tmp_path: Path
) -> None:
    """Merged, whatever the method; the object stays what it was. A folder is the same, with its tokenizer."""
    folder = save(build, tmp_path / "a", **config)
    model = adapted(build(), folder)
    wanted = logits(model)
    close(forward(model, tmp_path / "object"), wanted)
    np.testing.assert_array_equal(logits(model), wanted)
    build().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text('{"of": "the base"}')
    (folder / "tokenizer.json").write_text('{"of": "the adapter"}')
    for name, base in (("absolute", str(tmp_path / "base")), ("relative", "../base")):
        point_to(folder, base)
        close(forward(str(folder), tmp_path / name), wanted)
        assert (tmp_path / name / "tokenizer.json").read_text() == '{"of": "the adapter"}'


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_object_stays_what_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    """Though the export compares it on other weights, without gradients, in float32, another vocabulary, and
    PEFT writes what an adapter holds unasked into the weights that it is given."""
    model = untied().to(dtype).train()
    asked = save(untied, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])

    def trained() -> Any:
        other = untied()
        other.lm_head.weight.data += 0.1
        return other

    unasked = save(trained, tmp_path / "b", target_modules=["q_proj"], embeddings=True)
    config = model.config.to_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = {"b": unasked, "a": asked}
    edgepeft.export(model, tmp_path / "bundle", bits=4, adapters=adapters, train=False)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_folder_of_a_classifier_brings_its_head(tmp_path: Path) -> None:
    """The base has none; PEFT noted the task, and the head says how many classes there are."""
    models.bert_encoder().save_pretrained(tmp_path / "base")
    build = lambda: transformers.BertForSequenceClassification.from_pretrained(  # noqa: E731
        tmp_path / "base", num_labels=5
    ).eval()
    folder = save(build, tmp_path / "a", target_modules=["query"], task_type="SEQ_CLS")
    point_to(folder, str(tmp_path / "base"))
    got = forward(str(folder), tmp_path / "bundle")
    close(got, logits(adapted(build(), folder)))
    assert got.shape == (2, 5)


def refuse(match: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(edgepeft.EdgePeftError, match=match) as caught:
        edgepeft.export(model, tmp_path / "bundle", **UNVERIFIED)
    assert "\n" not in str(caught.value)


def test_an_adapter_whose_base_is_not_there(tmp_path: Path) -> None:
    folder = save(tied, tmp_path / "a", target_modules=["q_proj"])
    point_to(folder, "/nowhere/base")
    refuse(
        r"is an adapter of /nowhere/base, which is not there: export that with --adapter",
        str(folder),
        tmp_path,
    )
    point_to(folder, "")
    refuse("is an adapter that names no base", str(folder), tmp_path)
    point_to(folder, str(folder))
    refuse("is an adapter that names no base", str(folder), tmp_path)


def test_an_adapter_that_is_no_change_of_weights(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    refuse("type PROMPT_TUNING cannot be merged into its base", peft.get_peft_model(tied(), config), tmp_path)
