"""The card beside a trained adapter, as huggingface_hub and PEFT read it; its command as the command line."""

import dataclasses
import json
import shlex
import types
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import ModelCard

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.cli.adapt import adapt as adapt_command
from edgepeft.runtime.training.model_card import CARD_FILE, command, model_card
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.report import AdaptReport, read_report

from ..conftest import Exported
from .test_learning import Make, records, step_by_step

OPTIONS: dict[str, Any] = {"adapter": "plain", "steps": 100, "seq_len": 16, "learning_rate": 2e-3, "seed": 3}


@pytest.fixture(scope="module", params=["bert-classifier", "llama-tied"])
def trained(
    exported: Make, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Exported, Path, AdaptReport]:
    """A bundle, the folder of an adapter that learned with it, and the report."""
    bundle, root = exported(request.param, 32), tmp_path_factory.mktemp("card")
    folder = root / "out"
    with edgepeft.load(step_by_step(bundle.folder, root / "b"), memory_budget="2GiB") as device:
        report = device.adapt(records(request.param), folder, **OPTIONS)
    return bundle, folder, report


def test_the_hub_reads_it(trained: tuple[Exported, Path, AdaptReport]) -> None:
    bundle, folder, report = trained
    card = ModelCard.load(folder / CARD_FILE)
    assert card.data.library_name == "peft"
    assert card.data.base_model == bundle.manifest.model.name
    assert card.data.pipeline_tag == bundle.manifest.task
    assert card.data.tags == [f"base_model:adapter:{bundle.manifest.model.name}", "lora", "edgepeft"]
    assert f"{report.held_out_after.loss:.4f}" in card.text
    assert f"{report.trained_values:,} in" in card.text
    assert f"{report.records['train']} train" in card.text
    assert str(folder.parent) not in card.content, "a path of the device"
    assert str(bundle.folder) not in card.content


def test_it_is_a_function_of_the_report(trained: tuple[Exported, Path, AdaptReport]) -> None:
    _, folder, _ = trained
    again = model_card(read_report(folder / "adapt_report.json"), load_adapter(folder))
    assert again == (folder / CARD_FILE).read_text("utf-8")


def test_its_command_is_one(trained: tuple[Exported, Path, AdaptReport]) -> None:
    """The command line parses it into the options that the update had."""
    _, _, report = trained
    told = _parsed(command(report))
    assert told["budget"] == 2 * 2**30
    assert {name: told[name] for name in OPTIONS} == OPTIONS
    every = {
        "add_labels": ("a b", "c"), "rank": 3, "method": "ia3", "trainable": "lora_B", "top_blocks": 2,
        "epochs": 4, "batch_size": 2, "accumulation_steps": 3, "seq_len": 9, "learning_rate": 0.5,
        "lora_plus_ratio": 16.0, "warmup_steps": 1, "schedule": "cosine", "weight_decay": 0.1,
        "strategy": "streamed", "optimizer_state": "8bit", "max_grad_norm": 0.0, "drift_weight": 0.2,
        "eval_fraction": 0.25, "seed": 5,
    }  # fmt: skip
    assert every.keys() == vars(TrainingOptions()).keys() - {"adapter", "steps", "resume"}
    options = json.loads(json.dumps(vars(TrainingOptions()) | every))
    told = _parsed(command(dataclasses.replace(report, options=options)))
    assert {name: told[name] for name in every} == every


def _parsed(text: str) -> dict[str, Any]:
    program, name, *words = shlex.split(text)
    assert (program, name) == ("edgepeft", "adapt")
    return adapt_command.make_context("adapt", words, obj=types.SimpleNamespace()).params


def test_peft_opens_and_saves_the_folder_and_a_bundle_takes_it(
    trained: tuple[Exported, Path, AdaptReport], tmp_path: Path
) -> None:
    bundle, folder, _ = trained
    model = peft.PeftModel.from_pretrained(bundle.torch_model(), str(folder))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / CARD_FILE).write_bytes((folder / CARD_FILE).read_bytes())
    model.save_pretrained(str(copy))  # which reads the card and adds to it
    assert "## Evaluation" in ModelCard.load(copy / CARD_FILE).text
    with edgepeft.load(bundle.folder) as device:
        device.load_adapter("mine", folder)
