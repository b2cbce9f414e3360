"""A LoRA on embeddings and convolutions of many models, as PEFT has it; the export verifies each."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import transformers

import edgepeft
from edgepeft.adapters import PREFIX, Adapter, load_adapter, save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, ExportError
from edgepeft.slots import CONVOLUTION, EMBEDDING, LINEAR, LORA
from edgepeft.techniques import of_slot

from .. import task_models, zoo
from ..training.test_learning import step_by_step
from . import parity
from .test_stored_modules import save, tied

Build = Callable[[], transformers.PreTrainedModel]


def family(name: str) -> Build:
    return lambda: zoo.build(name)


@pytest.mark.parametrize(
    ("build", "targets", "sites"),
    [
        # The head is tied to the table, and each has a LoRA of its own.
        pytest.param(tied, ["embed_tokens", "lm_head"], [LINEAR, EMBEDDING], id="tied"),
        pytest.param(family("wav2vec2"), r".*conv_layers.*conv$", [CONVOLUTION] * 2, id="wav2vec2"),
        pytest.param(family("gemma3"), ["embed_tokens"], [EMBEDDING], id="gemma3", marks=pytest.mark.slow),
        pytest.param(
            *(family("roberta"), ["position_embeddings", "word_embeddings"], [EMBEDDING] * 2),
            id="roberta",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(family("convnext"), r".*(patch_embeddings|downsampling_layer.1)$", [CONVOLUTION] * 2),
            id="convnext",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_outputs_and_gradients_are_pefts(
    build: Build, targets: list[str] | str, sites: list[str], tmp_path: Path
) -> None:
    """gemma3 scales what it looks up, and the LoRA with it."""
    adapter = save(build, tmp_path / "a", target_modules=targets)
    manifest = edgepeft.export(
        build(), tmp_path / "b", bits=4, block_size=zoo.BLOCK_SIZE, adapters={"a": adapter}, quick=True
    )
    assert [slot.site for slot in manifest.slots_of(LORA)] == sites
    assert manifest.verification is not None
    assert manifest.verification["outputs"]["adapter 'a'"] <= 1e-5
    assert manifest.verification["gradients"]["a"]["smallest_cosine"] >= 0.99999


def test_a_tied_pair_is_two_that_peft_opens(tmp_path: Path) -> None:
    """PEFT names one of them, and keeps both equal: in a bundle each trains for itself."""
    adapter = save(tied, tmp_path / "a", target_modules=["embed_tokens"], ensure_weight_tying=True)
    edgepeft.export(tied(), tmp_path / "b", adapters={"a": adapter}, quick=True)
    kept = load_adapter(tmp_path / "b" / "adapters" / "a")
    assert kept.config["target_modules"] == ["lm_head", "model.embed_tokens"]
    assert not kept.config["ensure_weight_tying"]
    changed = {key: 2 * value if "lm_head" in key else value for key, value in kept.tensors.items()}
    save_adapter(kept.with_tensors(changed, "changed"), tmp_path / "changed")
    opened = parity.in_torch("llama", tmp_path / "b", tmp_path / "changed").state_dict()
    for key, value in changed.items():
        name = key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        name = name if "lora_embedding" not in key else f"{key}.default"
        np.testing.assert_array_equal(opened[name].numpy(), value)


def test_the_row_of_the_padding_is_not_trained(tmp_path: Path) -> None:
    """As in PyTorch, also where the token is read as any other; every other row that is read changes."""
    parity.write("lora, embedding", "bert", 32, tmp_path)
    records = [{"input_ids": [5, 0, 7, 0, 9 + i], "label": i % 3} for i in range(6)]
    with edgepeft.load(step_by_step(tmp_path / "b", tmp_path / "c")) as device:
        report = device.adapt(records * 4, tmp_path / "out", rank=4, steps=20, learning_rate=1e-2)
    assert report.decision == "kept"
    key = f"{PREFIX}bert.embeddings.word_embeddings.lora_embedding_A"
    changed = np.flatnonzero(load_adapter(tmp_path / "out").tensors[key].any(axis=0))  # it begins with zeros
    assert set(changed) == {5, 7, *range(9, 15)}


def test_rows_differ_in_a_convolution(tmp_path: Path) -> None:
    adapter = save(task_models.vit, tmp_path / "a", target_modules=["projection", "fc1"])
    edgepeft.export(task_models.vit(), tmp_path / "b", adapters={"a": adapter}, quick=True)
    arrays = parity.batch("vit").arrays
    names = ["a", None] * (len(arrays["pixel_values"]) // 2)
    with edgepeft.load(tmp_path / "b") as device:
        (alone,), (without,) = (device.forward(arrays, name).values() for name in ("a", None))
        (got,) = device.forward(arrays, names).values()
    np.testing.assert_allclose(got[::2], alone[::2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1::2], without[1::2], rtol=0, atol=1e-5)


def test_a_fresh_one_begins_as_pefts(tmp_path: Path) -> None:
    """On an embedding A is zero and B is not; on a convolution the other way, and A within PEFT's bounds."""
    rng = np.random.default_rng(0)
    for method, name, module in (
        ("lora, embedding", "llama", "model.embed_tokens"),
        ("lora, convolution", "vit", "vit.embeddings.patch_embeddings.projection"),
    ):
        parity.write(method, name, 32, tmp_path / name)
        bundle = open_bundle(tmp_path / name / "b")
        slot = next(slot for slot in bundle.manifest.slots if slot.module == module)
        a, b = of_slot(slot).fresh(slot, 4, rng, bundle.read_weight).values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the table is tied
            layer = peft.get_peft_model(parity.FAMILIES[name](), parity.METHODS[method].config(name))
        theirs = layer.get_submodule(f"base_model.model.{module}")
        if slot.site == EMBEDDING:
            expected = [theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]]
        else:
            expected = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
        for ours, tensor in zip((a, b), expected, strict=True):
            assert ours.shape == tuple(tensor.shape)
            assert ours.any() == bool(tensor.detach().any())
            assert ours.std() == pytest.approx(tensor.detach().std(correction=0).item(), rel=0.2)


@pytest.mark.parametrize(
    ("build", "targets", "error", "message"),
    [
        (family("wav2vec2"), r".*pos_conv_embed.conv$", AdapterError, "a LoRA on a convolution in groups"),
        (family("t5"), ["shared"], ExportError, "module shared shares its table with other embeddings"),
    ],
)
def test_what_cannot_be_had_is_refused(
    build: Build, targets: list[str] | str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    adapter = save(build, tmp_path / "a", target_modules=targets)
    with pytest.raises(error, match=message):
        edgepeft.export(build(), tmp_path / "b", adapters={"a": adapter}, quick=True)


def test_an_adapter_of_another_site_or_size_does_not_fit(tmp_path: Path) -> None:
    parity.write("lora, embedding", "bert", 32, tmp_path)
    adapter = load_adapter(tmp_path / "a")
    bundle = open_bundle(tmp_path / "b")
    stem = f"{PREFIX}bert.embeddings.word_embeddings"
    a, b = (adapter.tensors[f"{stem}.lora_embedding_{name}"] for name in "AB")
    linear = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    with pytest.raises(
        AdapterError, match="is a embedding in this bundle, the adapter's tensors are of a lin"
    ):
        bundle.check_fit(Adapter(adapter.config, linear))
    longer = {f"{stem}.lora_embedding_A": np.tile(a, 2), f"{stem}.lora_embedding_B": b}
    with pytest.raises(AdapterError, match=r"A is \[640, 4\] in the adapter, \[320, 'size'\] in this bundle"):
        bundle.check_fit(Adapter(adapter.config, longer))
    with pytest.raises(AdapterError, match=r"expected \[rank, num_embeddings\] and \[embedding_dim, rank\]"):
        Adapter(adapter.config, {f"{stem}.lora_embedding_A": a[:2], f"{stem}.lora_embedding_B": b})
