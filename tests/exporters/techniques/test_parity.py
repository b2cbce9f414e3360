"""Every method of PEFT's that there is: outputs, gradients, training and text are PEFT's, and back again."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

import edgepeft
from edgepeft.adapters import Adapter, load_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, UpdateRejectedError
from edgepeft.techniques import of_config, peft_methods, technique

from .. import sharing
from ..training.test_learning import (
    BATCH,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    SEED,
    WARMUP,
    WEIGHT_DECAY,
    records,
    step_by_step,
    torch_losses,
)
from . import parity
from .method_table import PATH, REFUSED

# How PEFT calls transformers with a prefix.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

Make = Callable[[str, str, int], Path]
KINDS = {"llama": "llama-tied", "bert": "bert-classifier", "vit": "vit"}
CASES = [(name, family) for name, method in parity.METHODS.items() for family in method.families]
ROWS = (
    "lora",
    "lora, bias all",
    "ia3",
    "vera",
    "vera, drawn",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "adalora",
    "adalora, allocated",
    "oft",
    "lora_bias",
    "lora, embedding",
    "road",
    "road, 4",
    "miss",
    "miss, mini",
)
"""Those whose rows may differ."""
WITHOUT_WEIGHTS = (
    "dora",
    "ia3",
    "ln_tuning",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "oft",
    "oft, shared",
    "road",
    "road, 4",
    "hra",
    "lora, tokens",
    "trainable_tokens",
)
LANGUAGE = [name for name, family in CASES if family == "llama"]
# The first family of each method is tried by default, the others with the slow tests.
EACH = [
    pytest.param(name, family, marks=[pytest.mark.slow] * (family != parity.METHODS[name].families[0]))
    for name, family in CASES
]


@pytest.fixture(scope="module")
def bundle(shared: sharing.Shared) -> Make:
    """`bundle(method, family, bits)`: the folder with the bundle `b` and PEFT's adapter `a`."""

    def make(method: str, family: str, bits: int) -> Path:
        def export(root: Path) -> None:
            parity.write(method, family, bits, root)

        return shared(f"parity/{method}/{family}/{bits}", export)

    return make


def adapted(path: Path, output: Path, family: str, steps: int, **options: Any) -> Any:
    """The report of an update, as `torch_losses` trains."""
    with edgepeft.load(path, memory_budget="2GiB") as device:
        return device.adapt(
            records(KINDS[family]),
            output,
            **{
                "steps": steps,
                "batch_size": BATCH,
                "seq_len": None if family == "vit" else 16,
                "seed": SEED,
                "warmup_steps": WARMUP,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "max_grad_norm": MAX_GRAD_NORM,
            }
            | options,
        )


def test_every_type_of_pefts_is_a_technique_or_refused_by_name() -> None:
    """And the documents say why; every technique has a case here."""
    configs = [
        method.config("llama").to_dict() | {"peft_type": method.config("llama").peft_type.value}
        for method in parity.METHODS.values()
    ]
    assert set(peft_methods()) == {of_config(config, "PEFT").name for config in configs}
    ours = {technique(name).peft_type for name in peft_methods()}
    types = {item.value for item in peft.PeftType}
    assert types == ours | REFUSED.keys()
    assert not ours & REFUSED.keys()
    page = PATH.read_text(encoding="utf-8")
    for name in sorted(REFUSED):
        assert f"| {name} | {REFUSED[name]} |" in page
        with pytest.raises(AdapterError, match=f"peft_type is '{name}', edgepeft runs .*LORA"):
            Adapter({"peft_type": name}, {}, "a")


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("bits", parity.BITS)
@pytest.mark.parametrize(("method", "family"), EACH)
def test_outputs_and_gradients_are_pefts(method: str, family: str, bits: int, bundle: Make) -> None:
    """As export has compared them; and once more with PEFT's model over the bytes of the bundle."""
    root = bundle(method, family, bits)
    manifest = open_bundle(root / "b").manifest
    assert manifest.verification is not None
    assert manifest.verification["outputs"]["adapter 'a'"] <= (1e-4 if bits == 32 else 1e-3)
    assert manifest.verification["gradients"]["a"]["smallest_cosine"] >= (0.9999 if bits == 32 else 0.999)
    assert {strategy.name for strategy in manifest.strategies} >= {"resident", "checkpointed", "streamed"}
    model = parity.in_torch(family, root / "b", root / "a")
    with edgepeft.load(root / "b") as device:
        assert parity.difference(device, family, "a", model) <= (1e-4 if bits == 32 else 1e-3)
        with parity.disabled(model) as base:
            assert parity.difference(device, family, "a", base) > 1e-2, "it has no effect"


@pytest.mark.parametrize("method", LANGUAGE)
def test_text_is_pefts(method: str, bundle: Make) -> None:
    """Greedy, in the decoder's graph and without it, and as a row beside one without an adapter."""
    root = bundle(method, "llama", 32)
    model = parity.in_torch("llama", root / "b", root / "a")
    model.config.use_cache = True
    prompts = [[5, 9, 11], [7, 200, 31, 8, 90]]
    said = [parity.greedy(model, prompt, 12) for prompt in prompts]
    with edgepeft.load(root / "b") as device:
        assert device.manifest.decoder is not None
        assert [device.generate_ids(prompt, "a", max_new_tokens=12) for prompt in prompts] == said
        plain = device.generate_ids(prompts[0], None, max_new_tokens=12)
        assert plain != said[0]
        rows = device.generate_ids([prompts[0], *prompts], [None, "a", "a"], max_new_tokens=12)
        assert rows == [plain, *said]


@pytest.mark.parametrize("method", LANGUAGE)
def test_rows_and_mixtures_are_exact_or_refused(method: str, bundle: Make) -> None:
    """A row beside one without an adapter is what it is alone; half of an adapter and two of them are refused
    where that has no meaning."""
    root, arrays = bundle(method, "llama", 32), parity.batch("llama").arrays
    counted = arrays["attention_mask"] == 1
    with edgepeft.load(root / "b") as device:
        alone = [next(iter(device.forward(arrays, name).values())) for name in ("a", None)]
        expected = np.where(np.array([1, 0, 1, 0], bool)[:, None, None], *alone)
        if method in ROWS:
            (got,) = device.forward(arrays, ["a", None, "a", None]).values()
            np.testing.assert_allclose(got[counted], expected[counted], rtol=0, atol=1e-4)
        else:
            with pytest.raises(AdapterError, match="cannot differ in it"):
                device.forward(arrays, ["a", None, "a", None])
        if method in WITHOUT_WEIGHTS:
            with pytest.raises(AdapterError, match="cannot be mixed"):
                device.forward(arrays, {"a": 0.5})
        else:
            (half,) = device.forward(arrays, {"a": 0.5}).values()
            assert np.abs(half - alone[0])[counted].max() > 1e-3


@pytest.mark.parametrize("method", ["lora", "lora, embedding", "lora_bias", "ia3"])
def test_two_at_once_are_what_they_are_in_peft(method: str, bundle: Make, tmp_path: Path) -> None:
    """Sums, and products of IA³'s vectors."""
    root = bundle(method, "llama", 32)
    other = parity.save(method, "llama", tmp_path / "other", seed=2)
    model = parity.in_torch("llama", root / "b", root / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a LoRA with a bias over no bias cannot be merged
        model.load_adapter(str(other), "other")
    model.base_model.set_adapter(["default", "other"])
    with edgepeft.load(root / "b") as device:
        assert parity.difference(device, "llama", {"a": 1.0, other: 1.0}, model) <= 1e-4


def test_two_whose_tensors_have_one_name_are_refused(tmp_path: Path) -> None:
    adapters = {name: parity.save(name, "bert", tmp_path / name) for name in ("dora", "lora")}
    with pytest.raises(AdapterError, match="slot for LoRA, another adapter one for DoRA, and PEFT calls"):
        edgepeft.export(parity.FAMILIES["bert"](), tmp_path / "b", adapters=adapters, quick=True)


@pytest.mark.parametrize(("method", "family"), EACH)
def test_training_follows_pytorch_and_returns_to_peft(
    method: str, family: str, bundle: Make, tmp_path: Path
) -> None:
    root = bundle(method, family, 32)
    path, kind = step_by_step(root / "b", tmp_path / "b"), KINDS[family]
    model = parity.in_torch(family, root / "b", root / "a", trains=True)
    expected = torch_losses(model, records(kind), 20)
    rejected, losses = False, []
    try:
        losses = adapted(path, tmp_path / "out", family, 20, adapter="a").losses
    except UpdateRejectedError as error:
        rejected, losses = True, (error.report or {})["losses"]
    np.testing.assert_allclose(losses, expected, rtol=0.01)
    if rejected:  # what is kept, a fresh one shows
        return
    reopened = parity.in_torch(family, root / "b", tmp_path / "out")
    with edgepeft.load(root / "b") as device:
        assert parity.difference(device, family, tmp_path / "out", reopened) <= 1e-4
    assert load_adapter(tmp_path / "out").config["peft_type"] == load_adapter(root / "a").config["peft_type"]


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize(("method", "family"), EACH)
def test_every_strategy_learns_the_same_from_a_fresh_one(
    method: str, family: str, bundle: Make, tmp_path: Path
) -> None:
    """Which begins as the base, and opens in PEFT; one of tokens has to say which, so it begins as PEFT made
    it."""
    root = bundle(method, family, 4)
    # A language model has no head to fit, and what starts from zeros cannot be bounded by its own size.
    path = root / "b" if family == "llama" else step_by_step(root / "b", tmp_path / "b")
    name = load_adapter(root / "a").technique.name
    begins = {"adapter": "a"} if name == "trainable_tokens" else {"method": name}
    reports: dict[str, Any] = {}
    for strategy in ("resident", "checkpointed", "streamed"):
        options = {**begins, "strategy": strategy, "learning_rate": 1e-2, "max_grad_norm": 0.0}
        try:
            reports[strategy] = adapted(path, tmp_path / strategy, family, 24, **options).to_dict()
        except UpdateRejectedError as error:
            reports[strategy] = error.report
    assert all(report["strategy"].startswith(name) for name, report in reports.items())
    losses = [report["losses"] for report in reports.values()]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=2e-3)
    if reports["streamed"]["decision"] == "rejected":
        assert (name, family) == ("trainable_tokens", "bert"), "any other learns something"
        return
    reopened = parity.in_torch(family, root / "b", tmp_path / "streamed")
    with edgepeft.load(root / "b") as device:
        assert parity.difference(device, family, tmp_path / "streamed", reopened) <= 1e-4
        with parity.disabled(reopened) as base:
            assert parity.difference(device, family, tmp_path / "streamed", base) > 1e-4, "it is fresh"
