"""Prompts, P-tuning's network and prefixes: what no table of methods has."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import edgepeft
from edgepeft.adapters import load_adapter, write_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, ContextError, UsageError
from edgepeft.runtime.generation.options import GenerationOptions
from edgepeft.runtime.generation.prompt_cache import PromptCache
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.starting import starting_adapter

from .. import models, sharing, task_models
from ..training.test_learning import SEED, records, step_by_step, torch_losses
from . import parity
from .test_parity import adapted

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundle(shared: sharing.Shared) -> Make:
    """The small Llama's bundle `b` for a method, with PEFT's adapter `a`, as the table of methods has it."""

    def make(method: str) -> Path:
        return shared(f"parity/{method}/llama/32", lambda root: parity.write(method, "llama", 32, root))

    return make


@pytest.mark.filterwarnings("ignore:for MLP, the argument")
@pytest.mark.parametrize("strategy", ["resident", "streamed"])
def test_the_network_trains_as_pefts(strategy: str, bundle: Make, tmp_path: Path) -> None:
    """P-tuning's losses are PyTorch + PEFT's from the same network, and what is written is what it makes."""
    root = bundle("p_tuning")
    opened = open_bundle(root / "b")
    fresh = starting_adapter(opened, TrainingOptions(method="p_tuning", rank=6, seed=SEED))
    model = models.llama(tied=True)
    models.use_reference(model, models.read_reference(root / "b", opened.manifest))
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    wrapped = peft.get_peft_model(model, config).eval()
    network = {
        key.removeprefix("base_model.model.prompt_encoder."): torch.from_numpy(value)
        for key, value in fresh.tensors.items()
    }
    wrapped.prompt_encoder["default"].load_state_dict(network)
    expected = torch_losses(wrapped, records("llama-tied"), 20)
    path = step_by_step(root / "b", tmp_path / "b")
    report = adapted(path, tmp_path / "out", "llama", 20, method="p_tuning", rank=6, strategy=strategy)
    np.testing.assert_allclose(report.losses, expected, rtol=0.01)
    with torch.no_grad():
        made = wrapped.get_prompt_embedding_to_save("default").numpy()
    (written,) = load_adapter(tmp_path / "out").tensors.values()
    np.testing.assert_allclose(written, made, rtol=0, atol=0.02 * float(np.abs(made).max()))


def test_a_network_that_is_not_in_the_bundle_is_refused(bundle: Make, tmp_path: Path) -> None:
    root = bundle("p_tuning")
    path = tmp_path / "b"
    edgepeft.export(
        models.llama(tied=True), path, bits=32, adapters={"a": root / "a"}, quick=True, verify=False
    )
    with (
        edgepeft.load(path) as device,
        pytest.raises(UsageError, match="export the model with --method p"),
    ):
        device.adapt(records("llama-tied"), tmp_path / "out", method="p_tuning", steps=2)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_rows_of_prompts_of_different_lengths_are_what_each_is_alone(
    method: str, bundle: Make, tmp_path: Path
) -> None:
    """Of which one may have none; logits and text."""
    root = bundle(method)
    own = load_adapter(root / "a")
    longer = {key: np.concatenate([value, -value[:2]]) for key, value in own.tensors.items()}
    config = own.config | {"num_virtual_tokens": 7}
    (tmp_path / "longer").mkdir()
    other = type(own)(config, longer, "longer")
    write_adapter(other, tmp_path / "longer")
    arrays = parity.batch("llama").arrays
    counted = arrays["attention_mask"] == 1
    specs = ["a", None, tmp_path / "longer", "a"]
    with edgepeft.load(root / "b") as device:
        alone = [device.forward(arrays, spec)["logits"] for spec in specs]
        together = device.forward(arrays, specs)["logits"]
        for row in range(len(specs)):
            expected, mask = alone[row][row], counted[row]
            np.testing.assert_allclose(together[row][mask], expected[mask], rtol=0, atol=1e-4)
        prompts = [[5, 9, 11], [7, 3], [4, 200, 8], [1, 2, 3, 4]]
        said = [
            device.generate_ids(prompt, spec, max_new_tokens=8)
            for prompt, spec in zip(prompts, specs, strict=True)
        ]
        assert device.generate_ids(prompts, specs, max_new_tokens=8) == said
        assert said[0] != device.generate_ids(prompts[0], None, max_new_tokens=8)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_prompt_cache_goes_on_behind_virtual_tokens(method: str, bundle: Make, tmp_path: Path) -> None:
    """In memory and in a file; another adapter's is refused."""
    root = bundle(method)
    ids = [5, 9, 11, 40, 41, 42]
    with edgepeft.load(root / "b") as device:
        expected = device.generate_ids(ids, "a", max_new_tokens=8)
        options = GenerationOptions(max_new_tokens=2)
        begun = device._generator._begin([ids[:4]], "a", options, None, keep=True, as_text=False)
        begun.generation.run()
        assert begun.generation.kept is not None
        kept = PromptCache.of(begun.generation.kept[0], begun.made_by, begun.generation.kept[1])
        kept.save(tmp_path / "cache")
        for given in (kept, tmp_path / "cache"):
            assert device.generate_ids(ids, "a", prompt_cache=given, max_new_tokens=8) == expected
        with pytest.raises(UsageError, match="another adapter"):
            device.generate_ids(ids, None, prompt_cache=kept, max_new_tokens=8)


def test_virtual_tokens_count_in_the_context(bundle: Make) -> None:
    root = bundle("prompt_tuning")
    with edgepeft.load(root / "b") as device:
        longest = device.manifest.model.max_length
        ids = [[1] * (longest - 4)]
        assert device.forward({"input_ids": ids})["logits"].shape[1] == longest - 4
        with pytest.raises(UsageError, match="60 tokens a row and 5 virtual tokens in front of them"):
            device.forward({"input_ids": ids}, "a")
        with pytest.raises(ContextError, match="the prompt has 65 tokens"):
            device.generate_ids(ids[0], "a", max_new_tokens=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": 6}, r"is \[5, 64\], expected \[6, width\]"),
        ({"num_transformer_submodules": 2}, "of an encoder-decoder is not supported"),
    ],
)
def test_what_a_configuration_says_wrongly_is_refused(
    change: dict[str, int], message: str, bundle: Make
) -> None:
    own = load_adapter(bundle("prompt_tuning") / "a")
    with pytest.raises(AdapterError, match=message):
        type(own)(own.config | change, own.tensors, "a")


def test_a_prefix_of_another_model_is_refused(bundle: Make, tmp_path: Path) -> None:
    own = load_adapter(bundle("prefix_tuning") / "a")
    (tmp_path / "a").mkdir()
    wider = {key: np.concatenate([value, value], axis=1) for key, value in own.tensors.items()}
    write_adapter(type(own)(own.config, wider, "a"), tmp_path / "a")
    with edgepeft.load(bundle("prefix_tuning") / "b") as device, pytest.raises(AdapterError, match="64 wide"):
        device.forward({"input_ids": [[1, 2]]}, tmp_path / "a")


def test_models_without_a_place_for_them_are_refused(tmp_path: Path) -> None:
    for make, method, message in (
        (models.bert_classifier, "prefix_tuning", "is for text-classification: use prompt_tuning"),
        (lambda: task_models.vit(), "prompt_tuning", "is for texts"),
        (lambda: task_models.t5(), "p_tuning", "of an encoder-decoder is not supported"),
    ):
        with pytest.raises(UsageError, match=message):
            edgepeft.export(make(), tmp_path / "b", method=method, quick=True)
    with pytest.raises(UsageError, match="--drift-penalty"):
        edgepeft.export(models.llama(tied=True), tmp_path / "b", method="prompt_tuning", drift_penalty=True)
    assert not (tmp_path / "b").exists()
