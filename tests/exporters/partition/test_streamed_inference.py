"""The inference graph in stages against the one graph they came from."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgepeft
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import open_bundle
from edgepeft.bundle.serialization import manifest_from_json
from edgepeft.errors import BudgetError, BundleError, VerificationError
from edgepeft.exporters.verify.streamed import verify_streamed
from edgepeft.runtime import streamed_model as streamed_module
from edgepeft.runtime.adapters.graph_inputs import graph_inputs, resolve
from edgepeft.runtime.generation.decoders.streamed import StreamedDecoder
from edgepeft.runtime.generation.loop import Generation
from edgepeft.runtime.generation.options import GenerationOptions
from edgepeft.runtime.memory.inference import RESIDENT, STREAMED, plan_forward, plan_generation
from edgepeft.runtime.memory.process import read_memory
from edgepeft.runtime.model import Model
from edgepeft.runtime.streamed_model import StreamedModel

from .. import models, sharing, task_models

MIB = 2**20
Make = Callable[[str, int], Path]
BUILDERS = {
    "llama": lambda: models.llama(tied=True),
    "llama-untied": lambda: models.llama(tied=False),
    "bert": models.bert_classifier,
    "vit": task_models.vit,
}

#: Those whose memory is planned; of the others outputs are compared.
MEASURED = [("llama", 4), ("bert", 4)]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value"], "vit": ["q_proj", "fc1"]}


@pytest.fixture(scope="module")
def bundle(shared: sharing.Shared) -> Make:
    """`bundle(name, bits)`: exported without training graphs, with a trained adapter `mine`."""

    def make(name: str, bits: int) -> Path:
        def write(root: Path) -> None:
            targets = TARGETS[name.partition("-")[0]]
            mine = models.save_adapter(BUILDERS[name](), root / "mine", 1, r=4, target_modules=targets)
            with sharing.measured() if (name, bits) in MEASURED else contextlib.nullcontext():
                edgepeft.export(
                    *(BUILDERS[name](), root / "b"),
                    bits=bits,
                    adapters={"mine": mine},
                    train=False,
                    verify=False,
                )

        return shared(f"streamed/{name}-{bits}", write) / "b"

    return make


def streamed(path: Path, adapter: str | None) -> StreamedModel:
    opened = open_bundle(path)
    model = StreamedModel(opened, threads=1)
    model.bind(graph_inputs(opened, resolve(opened, adapter)))
    return model


def greedy_streamed(
    model: StreamedModel, manifest: Manifest, prompt: list[int], count: int, chunk: int
) -> list[int]:
    decoder = StreamedDecoder(model, manifest, [len(prompt) + count - 1], chunk)
    options = GenerationOptions(max_new_tokens=count)
    return Generation(decoder, manifest, [prompt], options, None).run()[0].ids


def batch_of(name: str) -> dict[str, np.ndarray]:
    if name == "vit":
        return {key: value for key, value in task_models.batch(name).items() if key != "labels"}
    return models.batch().arrays


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("llama-untied", 32), ("bert", 4), ("vit", 4)])
def test_outputs_are_those_of_the_whole_graph(bundle: Make, name: str, bits: int) -> None:
    """With an adapter and without, rows of several lengths."""
    path, batch = bundle(name, bits), batch_of(name)
    with edgepeft.load(path, threads=1) as whole:
        for adapter in (None, "mine"):
            (expected,) = whole.forward(batch, adapter).values()
            counted = batch["attention_mask"] == 1 if expected.ndim == 3 else ...
            feeds = dict(batch)
            if name == "bert":
                feeds["token_type_ids"] = np.zeros_like(batch["input_ids"])
            got = streamed(path, adapter).forward(feeds)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(got[counted] / scale, expected[counted] / scale, atol=1e-5)


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("llama-untied", 32)])
def test_the_same_tokens_whatever_the_chunk(bundle: Make, name: str, bits: int) -> None:
    """Chunks that divide the prompt, that do not, of one token, and longer than the prompt."""
    path = bundle(name, bits)
    prompt = [20, 21, 5, 7, 300, 1, 1, 20, 9, 11, 13]
    with edgepeft.load(path, threads=1) as whole:
        for adapter in (None, "mine"):
            expected = whole.generate_ids(prompt, adapter, max_new_tokens=12)
            model = streamed(path, adapter)
            for chunk in (1, 2, 4, 10, 11, 50):
                assert greedy_streamed(model, whole.manifest, prompt, 12, chunk) == expected
            assert greedy_streamed(model, whole.manifest, prompt[:1], 1, 1) == (
                whole.generate_ids(prompt[:1], adapter, max_new_tokens=1)
            )


def test_layers_share_a_graph_and_the_output_layer_is_cut(bundle: Make) -> None:
    """Two layers of a kind; slices of any size give the same logits."""
    path = bundle("llama", 4)
    manifest = open_bundle(path).manifest
    chain = manifest.streamed_inference
    assert chain is not None
    assert [stage.forward for stage in chain.stages].count("infer.stage1") == 2
    assert chain.output_layer is not None
    batch = batch_of("llama")
    expected = streamed(path, None).forward(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_module, "_SLICE_VALUES", 7 * 64)  # 320 rows are not a multiple of 7
        np.testing.assert_allclose(streamed(path, None).forward(batch), expected, rtol=0, atol=1e-5)


def test_one_weight_is_decoded_at_a_time(bundle: Make) -> None:
    """A run holds no more than the whole output layer, which is one slice here, whatever its sizes: three
    weights of the feed-forward part (128 x 64 each) would be more."""
    chain = open_bundle(bundle("llama", 4)).manifest.streamed_inference
    assert chain is not None
    output_layer = 4 * 320 * 64
    assert chain.memory.activation_bytes(1, 1, 1, 1) < output_layer + 8 * 1024 < 4 * 3 * 128 * 64


def test_nothing_is_stored_twice(bundle: Make) -> None:
    """No graph of the chain holds a weight, and weights.bin grows only by numbers of rows."""
    path = bundle("llama", 4)
    manifest = open_bundle(path).manifest
    largest = max(
        (path / spec.file).stat().st_size for role, spec in manifest.graphs.items() if "infer." in role
    )
    assert largest < 32 * 1024
    end = max(weight.offset + weight.nbytes for weight in manifest.weights.values())
    assert end == manifest.files["weights.bin"].nbytes


STAGE = ("stages", 1)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("stages",), [], "streamed inference has no stage"),
        (("context",), "nothing", "there is no graph 'nothing'"),
        (("context_weights", "weight.0"), "nothing", "'nothing' is not among the weights"),
        ((*STAGE, "forward"), "nothing", "stage 1: there is no graph 'nothing'"),
        ((*STAGE, "context", "context.0"), "labels", "stage 1: 'labels' is not a model input or shared"),
        ((*STAGE, "adapter", "adapter.0"), "input_ids", "stage 1: 'input_ids' is not an adapter input"),
        ((*STAGE, "adapter"), {}, "stage 1: nothing is bound to the input"),
        ((*STAGE, "weights", "weight.1"), "lm_head.weight.scales", "stage 1: 'weight.1' reads .* has .* B"),
        ((*STAGE, "cache"), {}, "make 2 parts of the cache, the inference graph 4"),
        ((*STAGE, "cache", "present.9"), "present.9.key", "has no output .'present.9'"),
        (("output_layer", "rows"), 4096, "the output layer has 4096 rows, expected 320"),
        (("output_layer", "graph"), "infer.stage0", "output layer: nothing is bound to the input"),
        (("output_layer", "weights"), {}, "output layer: nothing is bound to the input"),
        (("memory", "session_bytes"), -1, "streamed_inference: session_bytes is -1"),
        (("memory", "peaks", 0, 0, "past_power"), 99, "a memory term has"),
    ],
)
def test_a_chain_that_contradicts_itself_is_refused(
    bundle: Make, place: tuple[str | int, ...], value: object, message: str
) -> None:
    """Before any of it is used."""
    data = json.loads((bundle("llama", 4) / "manifest.json").read_text())
    holder = data["streamed_inference"]
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(BundleError, match=message):
        manifest_from_json(json.dumps(data))


def with_memory(manifest: Manifest) -> Manifest:
    """A manifest whose resident graphs are large."""
    large = dataclasses.replace(manifest.inference_memory, session_bytes=1000 * MIB)
    decoder = manifest.decoder and dataclasses.replace(manifest.decoder, memory=large)
    return dataclasses.replace(manifest, inference_memory=large, decoder=decoder)


def too_little() -> int:
    """A budget for this process that such graphs do not fit in."""
    return read_memory().resident_bytes + 500 * MIB


def test_the_whole_graph_is_preferred_then_the_largest_chunk(bundle: Make) -> None:
    """And what the plan holds grows with the chunk."""
    manifest = with_memory(open_bundle(bundle("llama", 4)).manifest)

    def plan(budget_bytes: int | None, manifest: Manifest = manifest):  # type: ignore[no-untyped-def]
        sizes = {"prompt_tokens": 40, "max_new_tokens": 8, "rank": 4}
        return plan_generation(manifest, budget_bytes, 50 * MIB, **sizes)

    assert plan(None).role == plan(1200 * MIB).role == "decoder"
    without = dataclasses.replace(manifest, decoder=None)
    assert plan(None, without).role == plan(1200 * MIB, without).role == RESIDENT
    whole = plan(200 * MIB)
    assert (whole.role, whole.chunk) == (STREAMED, 40)
    tight = plan(whole.peak_bytes - 4096)
    assert 1 <= tight.chunk < 40
    assert tight.peak_bytes <= whole.peak_bytes - 4096
    # Two layers' keys and values and room for one layer's: 2 heads of 16 float32 for each of 48 tokens.
    assert tight.cache_bytes == 6 * 48 * 2 * 16 * 4
    with pytest.raises(BudgetError, match=r"40 tokens and 8 more need .* cache 36\.0 KiB") as caught:
        plan(51 * MIB)
    assert plan(caught.value.required_bytes).role == STREAMED


def test_a_cache_that_does_not_fit_is_refused_with_what_does(bundle: Make) -> None:
    """Before anything is opened; what the error says fits does, and one more token does not."""
    manifest = with_memory(open_bundle(bundle("llama", 4)).manifest)
    model = dataclasses.replace(manifest.model, max_length=10**6)
    manifest = dataclasses.replace(manifest, model=model)
    with pytest.raises(BudgetError, match=r"\d+ tokens fit, prompt and answer together") as caught:
        plan_generation(manifest, 90 * MIB, 50 * MIB, prompt_tokens=10, max_new_tokens=10**5, rank=0)
    fitting = int(re.search(r"\((\d+) tokens fit", str(caught.value))[1])  # type: ignore[index]
    plan_generation(manifest, 90 * MIB, 50 * MIB, prompt_tokens=1, max_new_tokens=fitting - 1, rank=0)
    with pytest.raises(BudgetError):
        plan_generation(manifest, 90 * MIB, 50 * MIB, prompt_tokens=1, max_new_tokens=fitting, rank=0)


def test_a_model_takes_the_way_that_fits(bundle: Make) -> None:
    """The same answers, forward passes and generation."""
    path = bundle("llama", 4)
    batch = batch_of("llama")
    with edgepeft.load(path, threads=1) as model:
        (logits,) = model.forward(batch, "mine").values()
        tokens = model.generate_ids([5, 6, 7], "mine", max_new_tokens=6)
    opened = open_bundle(path)
    opened = dataclasses.replace(opened, manifest=with_memory(opened.manifest))
    with Model(opened, memory_budget_bytes=too_little(), threads=1) as model:
        assert model.generate_ids([5, 6, 7], "mine", max_new_tokens=6) == tokens
        (got,) = model.forward(batch, "mine").values()
        counted = batch["attention_mask"] == 1
        np.testing.assert_allclose(got[counted], logits[counted], rtol=0, atol=1e-4)
        assert set(model._sessions._open) == {STREAMED}


def test_records_are_predicted_in_stages(bundle: Make) -> None:
    """A classifier inside a budget gives the scores that it gives without."""
    opened = open_bundle(bundle("bert", 4))
    records = [{"input_ids": [5, 9, 11]}, {"input_ids": [7] * 12}, {"input_ids": [3]}]
    with Model(opened, threads=1) as whole:
        expected = whole.predict(records, "mine", batch_size=2, seq_len=16)
    opened = dataclasses.replace(opened, manifest=with_memory(opened.manifest))
    with Model(opened, memory_budget_bytes=too_little(), threads=1) as model:
        got = model.predict(records, "mine", batch_size=2, seq_len=16)
        assert set(model._sessions._open) == {STREAMED}
    for one, other in zip(got, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_a_batch_that_fits_no_way_is_refused(bundle: Make) -> None:
    """With the smallest budget that would do."""
    manifest = with_memory(open_bundle(bundle("bert", 4)).manifest)
    with pytest.raises(BudgetError, match=r"8 rows of 32 tokens need .* weights streamed") as caught:
        plan_forward(manifest, 52 * MIB, 50 * MIB, shape=(8, 32), rank=4)
    assert (
        plan_forward(manifest, caught.value.required_bytes, 50 * MIB, shape=(8, 32), rank=4).role == STREAMED
    )
    without = dataclasses.replace(manifest, streamed_inference=None)
    with pytest.raises(BudgetError, match=r"8 rows of 32 tokens need .* is in one piece"):
        plan_forward(without, 900 * MIB, 50 * MIB, shape=(8, 32), rank=4)


def test_wrong_outputs_are_refused(bundle: Make) -> None:
    """What the exporter's check compares with is what it is given."""
    opened = open_bundle(bundle("llama", 4))
    batch, inputs = batch_of("llama"), graph_inputs(opened, [])
    right = streamed(opened.path, None).forward(batch)
    assert verify_streamed(opened, batch, inputs, right, 1e-5) < 1e-5
    with pytest.raises(VerificationError, match="streamed inference differs by"):
        verify_streamed(opened, batch, inputs, right + 0.01, 1e-4)
