"""Encoders as applications use them, from a folder as the hub has it: against transformers' own pipelines."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import edgepeft
from edgepeft import cli
from edgepeft.errors import DataError, ExportError, UsageError
from edgepeft.exporters.sources.loading import load_source
from edgepeft.exporters.sources.model_files import read_pooling

from . import models, task_models

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 cut w30", "w7 w8 w9 w10 w11 w12 w13 w14 w15 w16"]


def with_special_tokens(folder: Path, *names: str) -> Path:
    """The tokenizer of words with more tokens, from 302 on."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [
        {"id": 302 + index, "content": name, "special": True, **flags} for index, name in enumerate(names)
    ]
    path.write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<pad>"}
    settings |= {"mask_token": "[MASK]"} if "[MASK]" in names else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pipeline(task: str, folder: Path, **options: Any) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline(task, model=str(folder), tokenizer=tokenizer, **options)


def sentence_encoder(folder: Path, pooling: dict[str, Any], *, normalize: bool = True) -> Path:
    """A model as sentence-transformers saves it."""
    with_special_tokens(task_models.save_with_words(models.bert_encoder(), folder), "[CLS]")
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] * normalize)]
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": false}')
    prompts = {"prompts": {"query": "w40 w41 ", "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


@pytest.mark.parametrize(
    ("mode", "normalize", "train"),
    [
        ("max", False, False),
        *(pytest.param(mode, True, True, marks=pytest.mark.slow) for mode in ("max", "mean", "cls")),
    ],
)
def test_embeddings_are_those_of_sentence_transformers(
    tmp_path: Path, mode: str, normalize: bool, train: bool
) -> None:
    """Pooling, normalization, prompts and length as the folder says; the reference is torch's. With `train`,
    the exporter compares the gradients too."""
    switch = {"max": "max_tokens", "mean": "mean_tokens", "cls": "cls_token"}[mode]
    pooling = {"word_embedding_dimension": 64, f"pooling_mode_{switch}": True}
    folder = sentence_encoder(tmp_path / "model", pooling, normalize=normalize)
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, rank=2, train=train)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def reference(texts: list[str]) -> np.ndarray:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = {
            "max": hidden.masked_fill(mask == 0, -1e9).amax(1),
            "mean": (hidden * mask).sum(1) / mask.sum(1),
            "cls": hidden[:, 0],
        }[mode]
        return np.asarray((torch.nn.functional.normalize(pooled, dim=1) if normalize else pooled).numpy())

    with edgepeft.load(tmp_path / "bundle", memory_budget="2GiB") as device:
        got = device.embed(TEXTS, batch_size=3)
        assert (got.dtype, got.shape) == (np.float32, (4, 64))
        np.testing.assert_allclose(got, reference(TEXTS), atol=1e-5)
        asked = device.embed(TEXTS, prompt="query")
        np.testing.assert_allclose(asked, reference([f"w40 w41 {text}" for text in TEXTS]), atol=1e-5)
        assert np.array_equal(device.embed(TEXTS, prompt="document", batch_size=3), got)
        with pytest.raises(UsageError, match=r"has no prompt 'title' \(it has query, document\)"):
            device.embed(TEXTS, prompt="title")
        with pytest.raises(UsageError, match="classifies nothing"):
            device.classify(TEXTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "pooling .* is not supported: mean, CLS or max"),
        ({"pooling_mode": ["mean", "max"]}, "is not supported: mean, CLS or max"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves prompts out"),
    ],
)
def test_poolings_that_cannot_be_exported(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """By name; the newer spelling of what can be is read too."""
    folder = sentence_encoder(tmp_path / "model", settings)
    with pytest.raises(ExportError, match=message):
        read_pooling(str(folder))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    assert read_pooling(str(folder)).mode == "cls"


def test_entities_are_those_of_transformers(tmp_path: Path) -> None:
    """Grouped from BIO labels, with character offsets."""
    torch.manual_seed(0)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    config = transformers.BertConfig(
        **models.SIZES,
        max_position_embeddings=64,
        initializer_range=0.4,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = transformers.BertForTokenClassification(config).eval()
    folder = with_special_tokens(task_models.save_with_words(model, tmp_path / "model"), "[CLS]")
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, train=False)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{token}" for token in rng.integers(1, 300, 20)) + " cut cut" for _ in range(6)]
    expected = pipeline("token-classification", folder, aggregation_strategy="simple")(texts)
    with edgepeft.load(tmp_path / "bundle") as device:
        got = [item["entities"] for item in device.classify(texts)]
        with pytest.raises(DataError, match="expected a text"):
            device.classify([""])
    assert sum(map(len, got)) > 20
    for text, found, wanted in zip(texts, got, expected, strict=True):
        assert [(item["label"], item["start"], item["end"]) for item in found] == [
            (item["entity_group"], item["start"], item["end"]) for item in wanted
        ]
        np.testing.assert_allclose(
            [item["score"] for item in found], [item["score"] for item in wanted], atol=1e-4
        )
        assert all(item["text"] == text[item["start"] : item["end"]] for item in found)


@pytest.mark.versions
def test_masks_are_filled_and_learned(tmp_path: Path) -> None:
    """The best tokens are those of transformers; labels say what belongs in a mask."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**models.SIZES, max_position_embeddings=64, initializer_range=0.2)
    model = transformers.BertForMaskedLM(config).eval()
    folder = with_special_tokens(task_models.save_with_words(model, tmp_path / "model"), "[MASK]")
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, rank=4)
    expected = pipeline("fill-mask", folder)("w3 [MASK] w5")
    records = [
        {"text": f"w{10 * (index % 3 + 1)} [MASK]", "labels": [f"w{100 + index % 3}"]} for index in range(24)
    ]
    with edgepeft.load(tmp_path / "bundle", memory_budget="2GiB") as device:
        (result,) = device.predict([{"text": "w3 [MASK] w5"}])
        assert [token["token"] for token in result["masks"][0]] == [token["token"] for token in expected]
        np.testing.assert_allclose(
            [token["score"] for token in result["masks"][0]],
            [token["score"] for token in expected],
            atol=1e-4,
        )
        report = device.adapt(records, tmp_path / "new", steps=60, batch_size=8, learning_rate=1e-2)
        assert report.held_out_after.accuracy == 1.0
        learned = device.predict([records[1]], adapter=tmp_path / "new")[0]
        assert learned["expected"] == ["w101"]
        assert learned["masks"][0][0]["token_str"] == "w101"
        (by_ids,) = device.predict([{"input_ids": [3, 302, 302], "labels": [-100, 7, -100]}])
        assert by_ids["expected"] == ["w7", None]
        for record, message in (
            ({"text": "w1 w2"}, "holds no mask token"),
            ({"text": "[MASK]", "labels": []}, "expected a list of 1 tokens, one a mask"),
            ({"text": "[MASK]", "labels": ["w1 w2"]}, "is not one token"),
            ({"tokens": ["w1"]}, '"text", "labels"'),
        ):
            with pytest.raises(DataError, match=message):
                device.predict([record])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records[:3]))
    result = CliRunner().invoke(
        cli.main,
        ["predict", str(tmp_path / "bundle"), "--data", str(data), "--adapter", str(tmp_path / "new")],
        catch_exceptions=False,
    )
    assert "accuracy 1.0000" in result.stdout


def test_image_files_are_classified(tmp_path: Path) -> None:
    """PNG files and arrays, through the processor that the folder holds."""
    folder = tmp_path / "model"
    model = task_models.vit()
    model.save_pretrained(str(folder))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, train=False)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    with torch.no_grad():
        expected = model(**processor(Image.fromarray(pixels), return_tensors="pt")).logits.softmax(-1)[0]
    with edgepeft.load(tmp_path / "bundle") as device:
        for result in device.classify([tmp_path / "image.png", pixels, {"image": pixels, "label": 1}]):
            np.testing.assert_allclose(list(result["scores"].values()), expected.tolist(), atol=1e-4)
        assert result["expected"] == "green"
        with pytest.raises(DataError, match=r"record 1: image: nowhere\.png is no PNG"):
            device.classify(["nowhere.png"])


@pytest.mark.slow
def test_recordings_are_read_from_files(tmp_path: Path) -> None:
    """WAV files, through the extractor that the folder holds."""
    folder = tmp_path / "model"
    model = task_models.wav2vec2()
    model.save_pretrained(str(folder))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(folder)
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, train=False)
    samples = np.round(np.sin(np.arange(200) * 0.3) * 9000).astype(np.int16)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    inputs = extractor(samples / 2**15, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(inputs["input_values"].float()).logits.softmax(-1)[0].tolist()
    with edgepeft.load(tmp_path / "bundle") as device:
        for value in (str(tmp_path / "tone.wav"), samples):
            (got,) = device.classify([value])
            np.testing.assert_allclose(list(got["scores"].values()), expected, atol=1e-4)
        with pytest.raises(DataError, match=r"has 9 samples .* needs at least"):
            device.classify([samples[:9]])


def test_a_model_is_called_what_its_folder_was_called(tmp_path: Path) -> None:
    """A link keeps its own name: packages and caches have folders called `model` or a hash."""
    task_models.save_with_words(models.bert_classifier(), tmp_path / "model")
    (tmp_path / "topics").symlink_to(tmp_path / "model")
    assert load_source(str(tmp_path / "topics")).name == "topics"
    assert load_source(str(tmp_path / "model" / ".." / "topics")).name == "topics"
