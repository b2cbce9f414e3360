"""Images, recordings, tokens, encoder-decoders, regressions and several labels, through the public API."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

import edgepeft
from edgepeft import cli
from edgepeft.errors import DataError, UsageError
from edgepeft.exporters.sources.loading import load_source

from . import task_models
from .conftest import Exported
from .zoo import VISION

pytestmark = pytest.mark.versions

Make = Callable[[str, int], Exported]
TOLERANCE = {32: 1e-4, 4: 1e-3}
#: Of each task and each loss one is compared in every run.
FAST = ("vit", "wav2vec2", "bert-tokens", "bert-regression", "bert-multi-label", "t5")
CASES = [
    pytest.param(name, bits, marks=[] if bits == 32 and name in FAST else pytest.mark.slow)
    for name in task_models.BUILDERS
    for bits in (32, 4)
]


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run(*arguments: object) -> Any:
    return json.loads(shown(*arguments, "--json"))


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_outputs_losses_and_gradients_equal_pytorch(exported: Make, name: str, bits: int) -> None:
    """The batch is exactly what the transformers model takes, labels included."""
    bundle = exported(name, bits)
    arrays = task_models.batch(name)
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    inputs = {key: array for key, array in arrays.items() if key != "labels"}
    model = peft.PeftModel.from_pretrained(
        bundle.torch_model(), bundle.adapters["plain"], is_trainable=True
    ).eval()
    result = model(**tensors)
    result.loss.backward()
    if name in ("t5", "bart"):
        shifted = bundle.torch_model().prepare_decoder_input_ids_from_labels(tensors["labels"])
        inputs["decoder_input_ids"] = shifted.numpy()
    counted: Any = slice(None)
    if result.logits.ndim == 3:
        counted = arrays["labels"] != -100
    with edgepeft.load(bundle.folder) as device:
        (logits,) = device.forward(inputs, adapter="plain").values()
        loss, gradients = device.loss_and_gradients(arrays, adapter="plain")
    expected = result.logits.detach().numpy()
    scale = max(1.0, float(np.abs(expected[counted]).max()))
    np.testing.assert_allclose(logits[counted], expected[counted], rtol=0, atol=TOLERANCE[bits] * scale)
    assert loss == pytest.approx(result.loss.item(), rel=1e-4)
    wanted = {
        key.replace(".default.", ".").replace(".modules_to_save.", "."): parameter.grad.numpy()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        norms = np.linalg.norm(gradients[key]), np.linalg.norm(gradient)
        assert norms[1] > 1e-7, f"{key} has no gradient to compare"
        assert float((gradients[key] * gradient).sum() / (norms[0] * norms[1])) >= 0.9999, key
        assert norms[0] == pytest.approx(norms[1], rel=1e-3), key


def pictures(folder: Path) -> list[dict[str, Any]]:
    """Three kinds of noise around a mean of its own: lists, arrays and files."""
    rng = np.random.default_rng(1)
    made: list[dict[str, Any]] = []
    for index in range(24):
        pixels = (rng.standard_normal((3, 16, 16)) * 0.3 + index % 3 - 1).astype(np.float32)
        value: Any = pixels
        if index % 4 == 0:
            value = pixels.tolist()
        elif index % 4 == 1:
            value = str(folder / f"{index}.npy")
            np.save(value, pixels)
        made.append({"pixel_values": value, "label": task_models.LABELS[index % 3]})
    return made


def test_pictures_are_learned_and_told_apart(exported: Make, tmp_path: Path) -> None:
    """From `adapt` to `predict`, in memory that was planned."""
    bundle, records = exported("vit", 32), pictures(tmp_path)
    with edgepeft.load(bundle.folder, memory_budget="2GiB") as device:
        report = device.adapt(
            records, tmp_path / "new", rank=4, steps=30, batch_size=8, learning_rate=1e-2, eval_fraction=0.2
        )
        assert report.losses[-1] < 0.1 * report.held_out_before.loss
        assert report.held_out_after.accuracy == 1.0
        assert report.memory.predicted["activation_bytes"] > 0
        results = device.predict(records, adapter=tmp_path / "new")
        assert [result["label"] for result in results] == [record["label"] for record in records]
        assert results[4]["expected"] == records[4]["label"]
        with pytest.raises(UsageError, match="images have no length to cut"):
            device.predict(records, seq_len=8)
    reopened = peft.PeftModel.from_pretrained(bundle.torch_model(), tmp_path / "new").eval()
    pixels = torch.from_numpy(np.array(records[0]["pixel_values"], np.float32))[None]
    with torch.no_grad():
        probabilities = reopened(pixel_values=pixels).logits.softmax(-1)[0].tolist()
    assert list(results[0]["scores"].values()) == pytest.approx(probabilities, abs=1e-4)


def test_a_plan_for_pictures_has_no_sequence(exported: Make) -> None:
    """Twice the batch needs more; a sequence length is refused."""
    folder = exported("vit", 32).folder
    plans = [
        run("plan", folder, "--budget", "2GiB", "--batch-size", size)["strategies"][0] for size in (8, 16)
    ]
    assert plans[1]["activation_bytes"] > plans[0]["activation_bytes"]
    assert plans[1]["state_bytes"] - plans[0]["state_bytes"] == 3 * 8 * (3 * 16 * 16 * 4 + 8)
    refused = CliRunner().invoke(cli.main, ["plan", str(folder), "--budget", "2GiB", "--seq-len", "4"])
    assert refused.exit_code == 2
    assert "images have no length to cut" in refused.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "lacks the field 'pixel_values'"),
        ([[1.0, 2.0], [3.0]], "rows of different lengths"),
        (np.zeros((3, 8, 16)), r"has shape \[3, 8, 16\], expected \[3, 16, 16\]"),
        (np.full((3, 16, 16), np.nan), "no finite number"),
        ("nowhere.npy", "is no .npy file of numbers"),
        ({"a": 1}, "expected numbers of shape"),
    ],
)
def test_pixels_that_cannot_be_used(exported: Make, value: Any, message: str) -> None:
    with edgepeft.load(exported("vit", 32).folder) as device, pytest.raises(DataError, match=message):
        device.predict([{"pixel_values": value}])


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("vit", {"image": np.zeros((16, 16, 3), np.uint8)}, "give pixel_values"),
        ("wav2vec2", {"audio": np.zeros(100, np.float32)}, "give input_values"),
    ],
)
def test_a_bundle_without_a_processor_says_what_to_give(
    exported: Make, name: str, record: dict[str, Any], message: str
) -> None:
    """Pixels, or samples."""
    with edgepeft.load(exported(name, 32).folder) as device, pytest.raises(DataError, match=message):
        device.predict([record])


def test_a_file_of_objects_is_not_unpickled(exported: Make, tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with (
        edgepeft.load(exported("vit", 32).folder) as device,
        pytest.raises(DataError, match=r"no \.npy file"),
    ):
        device.predict([{"pixel_values": str(tmp_path / "objects.npy")}])


def test_recordings_are_learned_and_told_apart(exported: Make, tmp_path: Path) -> None:
    """Tones of three pitches, of different lengths."""
    rng = np.random.default_rng(2)
    records = []
    for index in range(24):
        time = np.arange(150 + 10 * (index % 4))
        tone = np.sin(time * (0.2 + 0.5 * (index % 3))) + 0.1 * rng.standard_normal(len(time))
        records.append({"input_values": tone.tolist(), "label": index % 3})
    bundle = exported("wav2vec2", 32)
    with edgepeft.load(bundle.folder, memory_budget="2GiB") as device:
        report = device.adapt(
            records, tmp_path / "new", rank=4, steps=40, batch_size=8, learning_rate=1e-2, eval_fraction=0.2
        )
        assert report.losses[-1] < 0.1 * report.held_out_before.loss
        results = device.predict(records, adapter=tmp_path / "new")
        right = [result["label"] == result["expected"] for result in results]
        assert sum(right) > 0.8 * len(right)
        with pytest.raises(DataError, match=r"has 12 samples .* the model needs at least 30"):
            device.predict([{"input_values": [0.5] * 12}])
        with pytest.raises(UsageError, match="has 12 samples a row, the model takes 30 to 480000"):
            device.forward({"input_values": [[0.5] * 12]})


@pytest.mark.parametrize(
    ("name", "sizes"), [("wav2vec2", ((3, 333, 2), (8, 997, 8))), ("vit", ((3, 1, 2), (16, 1, 8)))]
)
def test_the_memory_formula_holds_between_its_grid(
    exported: Make, name: str, sizes: tuple[tuple[int, int, int], ...]
) -> None:
    """Frames are a quotient that rounds down: at lengths that no stride divides, the formula is a little more
    than what is needed. Pictures have no length."""
    from edgepeft.exporters.measure import tensors as memory
    from edgepeft.exporters.measure.feeds import axis_sizes, sample_feeds

    bundle = exported(name, 32)
    strategy = bundle.manifest.strategies[0]
    spec = bundle.manifest.graphs["train"]
    for batch, samples, rank in sizes:
        feeds = sample_feeds(spec, axis_sizes(batch, samples), rank)
        (in_use,) = memory.bytes_in_use((bundle.folder / spec.file).read_bytes(), bundle.folder, [feeds])
        measured = float(in_use.max() - in_use.min())
        assert measured <= strategy.memory.activation_bytes(batch, samples, rank) <= 1.05 * measured


def test_tokens_are_learned_and_told_apart(tmp_path: Path) -> None:
    """Words of several tokens are labelled at their first."""
    folder = task_models.save_with_words(task_models.bert_tokens(), tmp_path / "model")
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, rank=4)
    rng = np.random.default_rng(3)
    records = []
    for _ in range(40):
        kinds = rng.integers(0, 3, 5)
        words = ["cut" if kind == 2 else f"w{10 * (kind + 1) + int(rng.integers(3))}" for kind in kinds]
        records.append({"tokens": words, "labels": [task_models.LABELS[kind] for kind in kinds]})
    with edgepeft.load(tmp_path / "bundle", memory_budget="2GiB") as device:
        device.adapt(records, tmp_path / "new", steps=200, batch_size=8, learning_rate=5e-3)
        (result,) = device.predict(records[:1], adapter=tmp_path / "new")
        assert result["labels"] == result["expected"] == records[0]["labels"]
        assert len(result["scores"]) == 5
        (by_ids,) = device.predict([{"input_ids": [10, 300, 20], "labels": [0, -100, 1]}])
        assert by_ids["expected"] == ["red", None, "green"]
        assert len(by_ids["labels"]) == 3
        for record, message in (
            ({"tokens": ["w1"], "labels": [0, 1]}, "expected a list of 1 labels"),
            ({"tokens": ["w1"], "labels": ["purple"]}, "'purple' was not known"),
            ({"tokens": "w1"}, "expected a list of words"),
            ({"words": "w1"}, '"tokens", "labels"'),
        ):
            with pytest.raises(DataError, match=message):
                device.predict([record])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    told = run("predict", tmp_path / "bundle", "--data", data, "--adapter", tmp_path / "new")
    assert told["accuracy"] > 0.9
    table = shown("predict", tmp_path / "bundle", "--data", data, "--adapter", tmp_path / "new")
    assert " ".join(records[0]["labels"]) in table
    assert f"accuracy {told['accuracy']:.4f}" in table


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_an_encoder_decoder_learns_to_answer(family: str, tmp_path: Path) -> None:
    """A prompt is answered by the numbers after its own; the answer is what transformers generates."""
    build = task_models.BUILDERS[family][0]
    folder = task_models.save_with_words(build(), tmp_path / "model")
    # Else a BART's texts would begin with <s>, which is no word here.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    edgepeft.export(str(folder), tmp_path / "bundle", bits=32, rank=8)
    records = [
        {"prompt": f"w{10 * (index % 4) + 10}", "completion": f"w{index % 4 + 100} w{index % 4 + 200}"}
        for index in range(24)
    ]
    with edgepeft.load(tmp_path / "bundle", memory_budget="2GiB") as device:
        assert device.manifest.streamed_inference is None  # every decoder layer reads what the encoder made
        report = device.adapt(records, tmp_path / "new", steps=60, batch_size=8, learning_rate=2e-2)
        assert report.losses[-1] < 0.5 * report.losses[0]
        answer = device.generate_ids([20], tmp_path / "new", max_new_tokens=2)
        assert device.generate("w20", tmp_path / "new", max_new_tokens=2).split() == [
            f"w{token}" for token in answer if token not in device.manifest.model.eos_token_ids
        ]
        with pytest.raises(UsageError, match="predicts nothing a record: use generate"):
            device.predict(records)
        with pytest.raises(UsageError, match="lacks the input 'decoder_input_ids'"):
            device.forward({"input_ids": [[3, 4]]})
        with pytest.raises(DataError, match='"prompt", "completion"'):
            device.adapt([{"text": "w1"}] * 8, tmp_path / "other")
    reopened = peft.PeftModel.from_pretrained(build(), tmp_path / "new").eval()
    expected = reopened.generate(input_ids=torch.tensor([[20]]), max_new_tokens=2, do_sample=False)[0]
    assert answer == expected[1:].tolist()  # BART's last token has to be its end


def test_a_regression_and_several_labels_are_learned(exported: Make, tmp_path: Path) -> None:
    """Numbers by name, and lists of the labels that apply."""
    rng = np.random.default_rng(4)
    numbers, several = [], []
    for index in range(24):
        ids = [index % 3 + 3, *rng.integers(10, 300, 4).tolist()]
        numbers.append({"input_ids": ids, "label": float(index % 3)})
        several.append({"input_ids": ids, "label": [["LABEL_0"], ["LABEL_0", 1], []][index % 3]})
    options: dict[str, Any] = {"rank": 4, "steps": 40, "batch_size": 8, "learning_rate": 1e-2}
    with edgepeft.load(exported("bert-regression", 32).folder, memory_budget="2GiB") as device:
        report = device.adapt(numbers, tmp_path / "numbers", **options)
        assert report.losses[-1] < 0.3 * report.losses[0]
        assert report.held_out_after.accuracy is None
        (result,) = device.predict(numbers[:1], adapter=tmp_path / "numbers")
        assert result["expected"] == {"LABEL_0": 0.0}
        assert abs(result["values"]["LABEL_0"]) < 0.6
        for label in ("high", 2**70, 1e300, float("nan")):
            with pytest.raises(DataError, match="expected 1 finite numbers"):
                device.adapt([{"input_ids": [1], "label": label}] * 8, tmp_path / "none", rank=2)
    with edgepeft.load(exported("bert-multi-label", 32).folder, memory_budget="2GiB") as device:
        report = device.adapt(several, tmp_path / "several", **options)
        assert report.losses[-1] < 0.5 * report.losses[0]
        results = device.predict(several[:3], adapter=tmp_path / "several")
        assert [result["expected"] for result in results] == [["LABEL_0"], ["LABEL_0", "LABEL_1"], []]
        assert [result["labels"] for result in results] == [result["expected"] for result in results]
        floats = device.predict([{"input_ids": [3], "label": [0.0, 1.0, 1.0]}])[0]
        assert floats["expected"] == ["LABEL_1", "LABEL_2"]
        with pytest.raises(DataError, match="expected a list of the labels that apply"):
            device.predict([{"input_ids": [3], "label": "LABEL_0"}])


@pytest.mark.parametrize("build", [task_models.vit, task_models.wav2vec2, task_models.bert_tokens])
def test_a_folder_gets_a_new_head(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(str(tmp_path / "model"))
    source = load_source(str(tmp_path / "model"), labels=["a", "b", "c", "d", "e"])
    assert type(source.model) is type(model)
    assert source.config.num_labels == 5


def test_a_model_without_a_loss_is_refused() -> None:
    """DeiT with a teacher has two heads and leaves their loss to its trainer."""
    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION))
    with pytest.raises(edgepeft.ExportError, match="DeiTForImageClassificationWithTeacher takes no labels"):
        load_source(model)


@pytest.mark.slow
def test_numbers_and_several_labels_are_shown(exported: Make, tmp_path: Path) -> None:
    """A regression has no accuracy; a record of several labels is right if all of them are."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [3, 4], "label": [1.0, 2.0, 3.5]}\n')
    bundle = exported("bert-regression-3", 32).folder
    table = shown("predict", bundle, "--data", data)
    assert "LABEL_0 1.0000, LABEL_1 2.0000, LABEL_2 3.5000" in table
    assert "accuracy" not in table
    data.write_text('{"input_ids": [3, 4], "label": ["LABEL_0", "LABEL_2"]}\n')
    bundle = exported("bert-multi-label", 32).folder
    (record,) = run("predict", bundle, "--data", data)["records"]
    table = shown("predict", bundle, "--data", data)
    assert "LABEL_0 LABEL_2" in table
    assert f"accuracy {float(record['labels'] == ['LABEL_0', 'LABEL_2']):.4f}" in table
    assert "regression" in shown("inspect", exported("bert-regression-3", 32).folder)


def test_a_problem_type_that_a_task_does_not_have_is_refused(tmp_path: Path) -> None:
    model = task_models.vit()
    vars(model.config)["problem_type"] = "ranking"  # some versions refuse to set it
    with pytest.raises(edgepeft.ExportError, match="problem_type is 'ranking', image-classification knows"):
        edgepeft.export(model, tmp_path / "bundle", rank=2)


def test_a_decoder_without_a_start_token_is_refused(tmp_path: Path) -> None:
    model = task_models.t5()
    model.config.decoder_start_token_id = None
    with pytest.raises(edgepeft.ExportError, match="no usable decoder_start_token_id"):
        edgepeft.export(model, tmp_path / "bundle", rank=2)
