"""ONNX files that other tools wrote: bundles from them against PyTorch on the weights that the files hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import peft
import pytest
import torch
import transformers

import edgepeft
from edgepeft.adapters import load_adapter
from edgepeft.exporters.sources.onnx_file import load_onnx_file

from .. import foreign, models

torch.set_num_threads(1)
BERT_TARGETS = ["query", "value", "dense"]
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def compare_with_pytorch(
    bundle: Path, model: transformers.PreTrainedModel, adapter: Path, labels: int | str, tolerance: float
) -> None:
    """Outputs with and without the adapter, the loss and every gradient."""
    batch = models.batch(labels=labels)
    inputs = {key: value for key, value in batch.arrays.items() if key != "labels"}
    attended = batch.arrays["attention_mask"].astype(bool)
    counted = attended if labels == "tokens" else slice(None)
    model.config.use_cache = False
    with edgepeft.load(bundle) as device:
        with torch.no_grad():
            expected = model(**batch.tensors).logits.numpy()
        got = device.forward(inputs)["logits"]
        np.testing.assert_allclose(got[counted], expected[counted], rtol=0, atol=tolerance)
        trained = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
        result = trained(**batch.tensors)
        got = device.forward(inputs, adapter="mine")["logits"]
        np.testing.assert_allclose(
            got[counted], result.logits.detach().numpy()[counted], rtol=0, atol=tolerance
        )
        loss, gradients = device.loss_and_gradients(batch.arrays, adapter="mine")
    assert loss == pytest.approx(result.loss.item(), rel=1e-4)
    result.loss.backward()
    wanted = {
        key.replace(".default.", ".").replace(".modules_to_save.", "."): parameter.grad.numpy()
        for key, parameter in trained.named_parameters()
        if parameter.grad is not None
    }
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        norms = np.linalg.norm(gradient), np.linalg.norm(wanted[key])
        assert norms[1] > 1e-7, f"{key} has no gradient to compare"
        assert float((gradient * wanted[key]).sum() / (norms[0] * norms[1])) >= 0.9999, key
        assert norms[0] == pytest.approx(norms[1], rel=1e-3), key


def test_a_classifier_of_torchs_exporter(files: Callable[[str], Path], tmp_path: Path) -> None:
    """Its weights have lost their names, its nodes know their modules."""
    adapter = models.save_adapter(
        foreign.bert(), tmp_path / "a", 1, r=4, task_type="SEQ_CLS",
        target_modules=BERT_TARGETS,
    )  # fmt: skip
    manifest = edgepeft.export(
        files("bert-dynamo"), tmp_path / "b", bits=32, adapters={"mine": adapter}, targets=BERT_TARGETS
    )
    assert manifest.task == "text-classification"
    assert manifest.model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert manifest.model.vocab_size == models.SIZES["vocab_size"]
    assert manifest.model.max_length == 64
    assert [item.name for item in manifest.graphs["inference"].inputs[:2]] == ["input_ids", "attention_mask"]
    figures = manifest.verification
    assert figures["outputs"]["no adapter"] <= 1e-4
    assert figures["gradients"]["mine"]["resolved_directions"] >= 20
    compare_with_pytorch(tmp_path / "b", foreign.bert(), adapter, 3, 1e-4)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param("llama-dynamo", LLAMA_TARGETS, marks=pytest.mark.slow),
        pytest.param("llama-script", LLAMA_TARGETS, marks=pytest.mark.slow),
        pytest.param("llama-cache", LLAMA_TARGETS, marks=pytest.mark.slow),
        pytest.param("llama-positions", LLAMA_TARGETS, marks=pytest.mark.slow),
    ],
)
def test_a_language_model(
    files: Callable[[str], Path], tmp_path: Path, name: str, targets: list[str]
) -> None:
    model = models.llama(tied=False)
    adapter = models.save_adapter(
        model, tmp_path / "a", 1, r=4, task_type="CAUSAL_LM", target_modules=targets
    )
    manifest = edgepeft.export(files(name), tmp_path / "b", bits=32, adapters={"mine": adapter})
    assert manifest.task == "text-generation"
    compare_with_pytorch(tmp_path / "b", models.llama(tied=False), adapter, "tokens", 2e-4)
    prompt = [5, 9, 2, 17]
    with torch.no_grad():
        expected = models.llama(tied=False).generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    with edgepeft.load(tmp_path / "b") as device:
        assert device.generate_ids(prompt, max_new_tokens=6) == expected[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("llama-q4-symmetric", "llama-q4-asymmetric")],
)
def test_a_quantized_file_keeps_its_weights(files: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    path = files(name)
    model = models.llama(tied=False)
    adapter = models.save_adapter(
        model, tmp_path / "a", 1, r=4, task_type="CAUSAL_LM", target_modules=LLAMA_TARGETS
    )
    manifest = edgepeft.export(path, tmp_path / "b", adapters={"mine": adapter})
    assert manifest.quantization.bits == 4
    assert manifest.verification["outputs"]["no adapter"] <= 1e-4
    parameters = dict(model.named_parameters())
    weights = foreign.dequantized(path)
    assert len(weights) == 15
    with torch.no_grad():
        for node, weight in weights.items():
            module = node.removesuffix("/MatMul_Q4").strip("/").replace("/", ".")
            parameters[f"{module}.weight"].copy_(torch.from_numpy(weight))
    compare_with_pytorch(tmp_path / "b", model, adapter, "tokens", 2e-4)
    stored = (tmp_path / "b" / manifest.weights_file).read_bytes()
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith(("_Q4", "_scales", "_zero_points")) and len(tensor.raw_data) >= 1024:
            assert tensor.raw_data in stored, tensor.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"), [("bert-fused", 32), ("bert-fused", None), ("bert-qdq", None), ("llama-nf4", None)]
)
def test_other_forms(files: Callable[[str], Path], tmp_path: Path, name: str, bits: int | None) -> None:
    """Against the file's outputs and central differences: PyTorch has no such weights to compare with."""
    manifest = edgepeft.export(files(name), tmp_path / "b", bits=bits, rank=4)
    assert manifest.quantization.bits == (bits or 4)
    assert len(manifest.slots_of("lora")) >= 13
    figures = manifest.verification
    assert figures["outputs"]["no adapter"] <= 1e-4
    assert figures["gradients"]["default"]["resolved_directions"] == 28
    assert figures["gradients"]["default"]["largest_relative_difference"] < 5e-3


@pytest.mark.slow
def test_an_encoder_is_pooled(tmp_path: Path) -> None:
    """The file returns hidden states, the bundle their normalized mean."""
    model = models.bert_encoder()
    foreign.export_encoder(model, tmp_path / "e.onnx")
    manifest = edgepeft.export(tmp_path / "e.onnx", tmp_path / "b", bits=32, rank=4)
    assert manifest.task == "feature-extraction"
    assert manifest.model.embedding_size == models.SIZES["hidden_size"]
    batch = models.batch()
    with edgepeft.load(tmp_path / "b") as device, torch.no_grad():
        (got,) = device.forward(batch.arrays).values()
        hidden = model(**batch.tensors).last_hidden_state
    mask = batch.tensors["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["int4", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_file_of_genai(
    genai: Callable[[str, str], Path], tmp_path: Path, kind: str, precision: str
) -> None:
    """PEFT's adapter for the transformers model fits, though the file packs query, key and value."""
    path = genai(kind, precision)
    model = foreign.decoder(kind)
    adapter = models.save_adapter(
        model, tmp_path / "a", 1, r=4, task_type="CAUSAL_LM", target_modules=LLAMA_TARGETS
    )
    bits = {"int4": None, "fp32": 32}[precision]
    manifest = edgepeft.export(path, tmp_path / "b", bits=bits, adapters={"mine": adapter})
    assert manifest.model.eos_token_ids == (2,)
    assert manifest.model.max_length == 64
    assert "tokenizer.json" in manifest.files
    assert manifest.verification["outputs"]["no adapter"] <= 1e-4
    assert manifest.verification["outputs"]["training graph"] <= 1e-4
    prompt = [5, 9, 3, 17]
    reference = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with edgepeft.load(tmp_path / "b") as device:
        generated = device.generate_ids(prompt, max_new_tokens=6)
    assert generated == greedy(reference, prompt, len(generated))
    if precision == "fp32":
        compare_with_pytorch(tmp_path / "b", model, adapter, "tokens", 2e-4)
    else:
        compare_rounded(tmp_path / "b", path, model, adapter)


def compare_rounded(bundle: Path, path: Path, model: Any, adapter: Path) -> None:
    """Loss and gradients with PyTorch's: the file rounds activations to int8, its training graph does not."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for node, weight in foreign.dequantized(path).items():
            module = node.removesuffix("/MatMul_Q4").strip("/").replace("/", ".")
            module = module.replace(".attn.", ".self_attn.")
            parts = [module]
            if module.endswith("qkv_proj"):
                parts = [module.replace("qkv_proj", f"{part}_proj") for part in "qkv"]
            if f"{parts[0]}.weight" not in parameters:
                assert module == "lm_head", module
                parts = ["model.embed_tokens"]  # tied, and looked up in the same codes
            sizes = [len(parameters[f"{part}.weight"]) for part in parts]
            rows = np.split(weight, np.cumsum(sizes)[:-1])
            for part, values in zip(parts, rows, strict=True):
                parameters[f"{part}.weight"].copy_(torch.from_numpy(values))
    model.config.use_cache = False
    trained = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    batch = models.batch(labels="tokens")
    result = trained(**batch.tensors)
    result.loss.backward()
    with edgepeft.load(bundle) as device:
        loss, gradients = device.loss_and_gradients(batch.arrays, adapter="mine")
    assert loss == pytest.approx(result.loss.item(), rel=1e-4)
    for key, parameter in trained.named_parameters():
        if parameter.grad is None:
            continue
        got, wanted = gradients[key.replace(".default.", ".")], parameter.grad.numpy()
        norms = np.linalg.norm(got), np.linalg.norm(wanted)
        assert float((got * wanted).sum() / (norms[0] * norms[1])) >= 0.9999, key
        assert norms[0] == pytest.approx(norms[1], rel=1e-3), key


def greedy(session: ort.InferenceSession, prompt: list[int], count: int) -> list[int]:
    """The file's own continuation, its whole text read again for every token."""
    ids = list(prompt)
    for _ in range(count):
        feeds: dict[str, np.ndarray] = {}
        for item in session.get_inputs():
            empty = np.zeros((1, 2, 0, 16), np.float32)
            tokens = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
            feeds[item.name] = tokens.get(item.name, empty)
        logits = np.asarray(session.run(["logits"], feeds)[0])
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["script", "genai"])
def test_a_few_steps_lower_the_loss(
    files: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    if kind == "genai":
        path = request.getfixturevalue("genai")("llama", "int4")
    else:
        path = files("llama-q4-asymmetric")
    edgepeft.export(path, tmp_path / "b", rank=4, targets=["q_proj", "v_proj"], verify=False)
    records = [{"input_ids": [3, 4, 5, 6, 7, 8, 9, 10]}] * 12
    with edgepeft.load(tmp_path / "b", memory_budget="2GiB") as device:
        batch = {
            "input_ids": np.array([records[0]["input_ids"]]),
            "labels": np.array([records[0]["input_ids"]]),
        }
        before, _ = device.loss_and_gradients(batch, adapter="default")
        device.adapt(records, output=tmp_path / "trained", steps=12, seq_len=16, learning_rate=1e-2)
        after, _ = device.loss_and_gradients(batch, adapter=str(tmp_path / "trained"))
    assert after < before - 0.1
    base = foreign.decoder("llama") if kind == "genai" else models.llama(tied=False)
    opened = dict(peft.PeftModel.from_pretrained(base, tmp_path / "trained").named_parameters())
    trained = load_adapter(tmp_path / "trained")
    assert len(trained.tensors) == 8
    for key, tensor in trained.tensors.items():
        stem, _, suffix = key.rpartition(".")
        np.testing.assert_array_equal(opened[f"{stem}.default.{suffix}"].detach().numpy(), tensor)


def test_linears_go_by_their_nodes_and_weights_too(files: Callable[[str], Path]) -> None:
    source = load_onnx_file(files("llama-script"))
    module = "model.layers.0.self_attn.q_proj"
    assert module in source.linears()
    nodes = {item.name: item for item in onnx.load(files("llama-script")).graph.node}
    node = nodes["/model/layers.0/self_attn/q_proj/MatMul"]
    assert source.resolve_targets([node.name, node.input[1], "v_proj"]) == [module, module, "v_proj"]
    assert node.input[1].startswith("onnx::MatMul_")
    assert "lm_head" in source.linears()
    assert "lm_head" not in source.linear_names()
