"""Configurations of classifiers as people write them: no token that pads, names of classes with gaps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import edgepeft
from edgepeft.exporters.sources.model_info import label_names

from .. import foreign, models, task_models

ROWS = [[5, 9, 200, 31, 7], [17, 3], [250, 11, 12, 13, 14, 15, 16], [40], [8, 0, 0]]


def llama_classifier(**options: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**models.SIZES, "max_position_embeddings": 64, "num_labels": 3, "initializer_range": 0.2}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, **options)).eval()


def gpt2_classifier(**options: object) -> transformers.PreTrainedModel:
    """Positions are learned, so padding on the left would be another input."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320, "num_labels": 3}
    config = transformers.GPT2Config(**sizes, initializer_range=0.2, **options)
    return transformers.GPT2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("build", [llama_classifier, pytest.param(gpt2_classifier, marks=pytest.mark.slow)])
def test_without_a_token_that_pads_the_mask_says_which_token_is_last(
    build: Callable[..., transformers.PreTrainedModel], tmp_path: Path
) -> None:
    """Rows of several lengths in one batch are what transformers makes of each alone; it refuses more. Some
    end in the token that the runtime pads with. The export verifies outputs, loss and gradients."""
    wanted = []
    alone = build(pad_token_id=None)
    with torch.no_grad():
        wanted = [alone(input_ids=torch.tensor([row])).logits[0].numpy() for row in ROWS]
    edgepeft.export(build(pad_token_id=None), tmp_path / "bundle", bits=32, rank=2)
    with edgepeft.load(tmp_path / "bundle") as device:
        assert device.manifest.model.pad_token_id is None
        got = device.classify([{"input_ids": row} for row in ROWS])
    scores = np.array([list(result["scores"].values()) for result in got])
    np.testing.assert_allclose(scores, torch.softmax(torch.tensor(np.array(wanted)), -1), atol=1e-4)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({0: "neg", 2: "pos"}, ("neg", "LABEL_1", "pos")),
        ({"1": "a", "2": "b", "3": "c"}, ("LABEL_0", "a", "b")),
        ({0: "neg", 1: "neg", 2: "pos"}, ("neg", "neg_1", "pos")),
        ({1: "LABEL_0"}, ("LABEL_0", "LABEL_0_1", "LABEL_2")),
        ({0: 5, 1: 7, 2: None}, ("5", "7", "None")),
        (None, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_every_class_has_one_name(named: dict[object, object] | None, expected: tuple[str, ...]) -> None:
    """What transformers calls it, where it calls it anything."""
    assert label_names(named, 3) == expected


def renamed(folder: Path, named: dict[str, str]) -> str:
    path = folder / "config.json"
    label2id = {name: int(number) for number, name in named.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": named, "label2id": label2id}))
    return str(folder)


@pytest.mark.parametrize("build", [task_models.bert_tokens, task_models.vit], ids=["tokens", "images"])
def test_a_folder_whose_classes_have_gaps(
    build: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "model")
    folder = renamed(tmp_path / "model", {"0": "none", "1": "one", "7": "seven"})
    manifest = edgepeft.export(folder, tmp_path / "bundle", bits=32, train=False, verify=False)
    assert manifest.model.labels == ("none", "one", "LABEL_2")


def test_a_file_whose_classes_have_gaps(files: Callable[[str], Path], tmp_path: Path) -> None:
    """The configuration beside an ONNX file."""
    path = tmp_path / "model.onnx"
    path.write_bytes(files("bert-script").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(foreign.bert().config.to_dict()))
    renamed(tmp_path, {"0": "neg", "2": "pos"})
    manifest = edgepeft.export(path, tmp_path / "bundle", train=False, verify=False)
    assert manifest.model.labels == ("neg", "LABEL_1", "pos")
    (tmp_path / "config.json").write_text('{"id2label": {"neg": 0}}')
    with pytest.raises(edgepeft.ExportError, match="does not name classes by their numbers"):
        edgepeft.export(path, tmp_path / "bundle2", train=False, verify=False)
