"""A LoRA on a classifier's own head, beside adapters that save the head whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import edgepeft
from edgepeft.adapters import load_adapter, save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.training.starting import fresh_adapter

from .. import models, task_models, zoo
from ..sources.test_model_argument import adapted
from .test_stored_modules import save


def swin() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.SwinConfig(**zoo.FAMILIES["swin"][2])
    return transformers.SwinForImageClassification(config).eval()


@pytest.mark.parametrize(
    "build",
    [task_models.vit, pytest.param(swin, marks=pytest.mark.slow), models.bert_classifier],
    ids=["vit", "swin", "bert"],
)
def test_a_lora_on_the_head_and_a_head_saved_whole_share_a_bundle(
    build: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    """The export verifies outputs, losses and gradients of both. A fresh adapter has one of the two, as PEFT
    would make it: it drops a LoRA on a module that is saved."""
    query = ".*(q_proj|query)$"
    adapters = {
        "lora": save(build, tmp_path / "lora", target_modules=".*(q_proj|query|classifier)$"),
        "saved": save(build, tmp_path / "saved", target_modules=query, modules_to_save=["classifier"]),
    }
    assert "classifier" in load_adapter(adapters["lora"]).modules
    manifest = edgepeft.export(build(), tmp_path / "bundle", adapters=adapters)
    assert {f"adapter {name!r}" for name in adapters} < set(manifest.verification["outputs"])
    assert all(item["smallest_cosine"] > 0.9999 for item in manifest.verification["gradients"].values())
    fresh = fresh_adapter(open_bundle(tmp_path / "bundle"), 2, 0)
    assert "classifier" not in fresh.modules
    assert "base_model.model.classifier.weight" in fresh.tensors
    save_adapter(fresh, tmp_path / "fresh")
    opened = adapted(build(), tmp_path / "fresh").state_dict()
    kept = {name.replace(".default.", ".") for name in opened if ".lora_" in name}
    assert kept == {name for name in fresh.tensors if ".lora_" in name}
