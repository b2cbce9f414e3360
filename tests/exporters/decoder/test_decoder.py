"""The decoder graph against PyTorch + PEFT and transformers' own `generate`."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers

import edgepeft
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.bundle.validation import validate_manifest
from edgepeft.exporters.decoder import slice_output_layer
from edgepeft.runtime.adapters.graph_inputs import graph_inputs, group_inputs, resolve
from edgepeft.runtime.generation.decoders.by_adapter import ByAdapter
from edgepeft.runtime.generation.decoders.in_place import InPlaceDecoder
from edgepeft.runtime.generation.prompt_cache import origin
from edgepeft.runtime.session import GraphSession

from .. import models, zoo
from ..sharing import Shared

NAMES = ("a", "b", "c", "d")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Adapters of different ranks and modules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "b": {"r": 2, "lora_alpha": 3, "target_modules": TARGETS[:3]},
    "c": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "d": {"r": 5, "lora_alpha": 5, "target_modules": ["o_proj", "gate_proj"]},
}
TOLERANCE = {32: 1e-4, 4: 1e-3}
CAPACITY = 48
NEW_TOKENS = 64
FAMILIES = ("llama", "gemma3")
SLOW = ("qwen2", "gemma2")
CASES = [
    *((family, bits) for family in FAMILIES for bits in (32, 4)),
    *(pytest.param(family, bits, marks=pytest.mark.slow) for family in SLOW for bits in (32, 4)),
]
#: Caps that scores of so small a model reach.
CAPS = {"gemma2": {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 2.0}}


def build(family: str) -> transformers.PreTrainedModel:
    """The zoo's model with room for more tokens, and no token that ends a text."""
    config, model, sizes = zoo.FAMILIES[family]
    torch.manual_seed(0)
    sizes = {**sizes, "max_position_embeddings": 128, "eos_token_id": None}
    sizes |= CAPS.get(family, {})
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


@dataclass
class Exported:
    """A family's bundle with four adapters."""

    bundle: Bundle
    adapters: dict[str, Path]
    family: str

    def torch_model(self) -> transformers.PreTrainedModel:
        """The PyTorch model on the bundle's weights."""
        model = build(self.family)
        manifest = self.bundle.manifest
        models.use_reference(model, models.read_reference(self.bundle.path, manifest))
        return model

    def decoder(
        self,
        mixture: Mapping[str, float],
        rows: int = 1,
        chunk: int = CAPACITY,
    ) -> InPlaceDecoder:
        """A decoder with these adapters mixed."""
        chosen = resolve(self.bundle, mixture) if mixture else []
        session = GraphSession(self.bundle, "decoder" if mixture else "decoder.plain")
        if mixture:
            session.bind(group_inputs(self.bundle.manifest, graph_inputs(self.bundle, chosen)))
        return InPlaceDecoder(session, self.bundle.manifest, rows, CAPACITY, chunk)


Make = Callable[[str, int], Exported]


@pytest.fixture(scope="module")
def decoders(shared: Shared) -> Make:
    def make(family: str, bits: int) -> Exported:
        def write(root: Path) -> None:
            adapters = {
                name: models.save_adapter(build(family), root / name, seed, task_type="CAUSAL_LM", **config)
                for seed, (name, config) in enumerate(ADAPTERS.items())
            }
            for each in (32, 4):
                edgepeft.export(
                    build(family),
                    root / f"{each}.edge",
                    bits=each,
                    block_size=zoo.BLOCK_SIZE,
                    adapters=adapters,
                    train=False,
                    verify=False,
                )

        root = shared(f"decoders/{family}", write)
        return Exported(open_bundle(root / f"{bits}.edge"), {name: root / name for name in ADAPTERS}, family)

    return make


def tokens(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 320, length).tolist()
    return ids


def torch_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return logits


def read_and_step(decoder: InPlaceDecoder, ids: list[int], prompt: int) -> np.ndarray:
    """Logits of the prompt's last token and of every token after it."""
    logits = [decoder.read(0, ids[:prompt]).copy()]
    logits += [decoder.step([token])[0].copy() for token in ids[prompt:]]
    return np.stack(logits)


@pytest.mark.parametrize(("family", "bits"), CASES)
def test_logits_equal_pytorch_without_with_one_and_with_mixed_adapters(
    decoders: Make, family: str, bits: int
) -> None:
    exported = decoders(family, bits)
    ids = tokens(30)
    for mixture in ({}, {"a": 1.0}, {"a": 0.5, "b": 1.5, "c": -0.7}):
        model: Any = exported.torch_model()
        for name, folder in exported.adapters.items():
            if name == "a":
                model = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
        if mixture:
            model.add_weighted_adapter(list(mixture), list(mixture.values()), "mixed", combination_type="cat")
            model.set_adapter("mixed")
            expected = torch_logits(model.eval(), ids)
        else:
            with model.disable_adapter():
                expected = torch_logits(model.eval(), ids)
        got = read_and_step(exported.decoder(mixture), ids, prompt=20)
        np.testing.assert_allclose(got, expected[19:], rtol=0, atol=TOLERANCE[bits])


@pytest.mark.parametrize(("family", "bits"), CASES)
def test_rows_of_a_batch_have_adapters_of_their_own(decoders: Make, family: str, bits: int) -> None:
    exported = decoders(family, bits)
    lengths = (5, 21, 13, 2)
    texts = [tokens(length + 4, seed) for seed, length in enumerate(lengths)]
    decoder = ByAdapter([(exported.decoder({name: 1.0}), [row]) for row, name in enumerate(NAMES)])
    read = [decoder.read(row, text[:-4]).copy() for row, text in enumerate(texts)]
    steps = [decoder.step([text[number - 4] for text in texts]).copy() for number in range(4)]
    for row, (name, text) in enumerate(zip(NAMES, texts, strict=True)):
        model = peft.PeftModel.from_pretrained(exported.torch_model(), str(exported.adapters[name]))
        expected = torch_logits(model.eval(), text)[lengths[row] - 1 :]
        got = np.stack([read[row], *(step[row] for step in steps)])
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[bits])


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_greedy_tokens_are_transformers_own(decoders: Make, family: str) -> None:
    exported = decoders(family, 32)
    prompt = tokens(9)
    model = exported.torch_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that no token ends
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    with edgepeft.load(exported.bundle.path) as device:
        assert device.generate_ids(prompt, max_new_tokens=NEW_TOKENS) == answer[0, len(prompt) :].tolist()


def test_a_prompt_in_chunks_is_the_prompt_at_once(decoders: Make) -> None:
    exported = decoders("gemma3", 4)
    ids = tokens(30)
    whole = read_and_step(exported.decoder({"a": 1.0}), ids, prompt=25)
    for chunk in (1, 7, 24):
        pieces = read_and_step(exported.decoder({"a": 1.0}, chunk=chunk), ids, prompt=25)
        np.testing.assert_allclose(pieces, whole, rtol=0, atol=2e-5)


def test_rows_of_different_lengths_are_each_as_alone(decoders: Make) -> None:
    exported = decoders("llama", 4)
    texts = [tokens(length, seed) for seed, length in enumerate((4, 17, 9))]
    batch = exported.decoder({}, rows=3)
    for row, text in enumerate(texts):
        alone = exported.decoder({}).read(0, text)
        np.testing.assert_allclose(batch.read(row, text), alone, rtol=0, atol=1e-6)
    batch.truncate(1, 0)  # a row that has ended does not disturb the others
    got = batch.step([7, 8, 9])
    assert batch.lengths == [5, 0, 10]
    for row, token in ((0, 7), (2, 9)):
        decoder = exported.decoder({})
        decoder.read(0, texts[row])
        np.testing.assert_allclose(got[row], decoder.step([token])[0], rtol=0, atol=1e-5)


def test_a_row_goes_on_from_a_snapshot_and_after_a_cut(decoders: Make) -> None:
    exported = decoders("qwen2", 4)
    ids = tokens(20)
    decoder = exported.decoder({})
    expected = decoder.read(0, ids).copy()
    state = decoder.snapshot(0)
    decoder.truncate(0, 12)
    np.testing.assert_allclose(decoder.read(0, ids[12:]), expected, rtol=0, atol=1e-5)
    other = exported.decoder({}, rows=2)
    other.restore(1, {name: part[:, :15] for name, part in state.items()})
    np.testing.assert_allclose(other.read(1, ids[15:]), expected, rtol=0, atol=1e-5)


def test_weights_are_stored_once_and_nodes_are_few(decoders: Make) -> None:
    bundle = decoders("llama", 4).bundle
    manifest = bundle.manifest
    joined = manifest.weights["model.layers.0.self_attn.q_proj+k_proj+v_proj.weight.q4"]
    first = joined.offset
    for name in ("q_proj", "k_proj", "v_proj"):
        part = manifest.weights[f"model.layers.0.self_attn.{name}.weight.q4"]
        assert part.offset == first
        first += part.nbytes
    assert first == joined.offset + joined.nbytes
    graph = bundle.path / manifest.graphs["decoder"].file
    model = onnx.load(graph, load_external_data=False).graph
    constants = {tensor.name for tensor in model.initializer}
    # What reads constants alone (scales that are cast) is computed when a session is opened.
    kinds = [node.op_type for node in model.node if not set(node.input) <= constants]
    layers = manifest.model.num_layers
    assert kinds.count("MatMulNBits") == 4 * layers + 1
    assert kinds.count("GroupQueryAttention") == layers
    assert len(kinds) <= 24 * layers + 12


def test_a_large_output_layer_in_slices_gives_the_same_logits_from_the_same_bytes(
    decoders: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices are read from the bytes of the whole; with one adapter and without."""
    whole = decoders("llama", 4)
    monkeypatch.setattr(slice_output_layer, "SLICE_WEIGHTS", 320 * 64 // 3 + 1)
    edgepeft.export(
        build("llama"),
        tmp_path / "sliced.edge",
        bits=4,
        block_size=zoo.BLOCK_SIZE,
        adapters=whole.adapters,
        train=False,
        verify=False,
    )
    sliced = Exported(open_bundle(tmp_path / "sliced.edge"), whole.adapters, "llama")
    for role in ("decoder", "decoder.plain", "decoder.int8", "decoder.int8.plain"):
        graph = sliced.bundle.path / sliced.bundle.manifest.graphs[role].file
        nodes = onnx.load(graph, load_external_data=False).graph.node
        heads = [
            node.output[0]
            for node in nodes
            if node.op_type == "MatMulNBits" and ".slice" in "".join(node.input)
        ]
        assert len(heads) == 3
    stored = [(each.bundle.path / "weights.bin").stat().st_size for each in (whole, sliced)]
    assert stored[0] == stored[1]
    ids = tokens(30)
    expected = torch_logits(sliced.torch_model(), ids)[19:]
    got = read_and_step(sliced.decoder({}), ids, prompt=20)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[4])
    adapted = read_and_step(sliced.decoder({"a": 1.0}), ids, prompt=20)
    np.testing.assert_array_equal(adapted, read_and_step(whole.decoder({"a": 1.0}), ids, prompt=20))


def test_no_adapter_runs_a_graph_without_lora_until_one_is_used(decoders: Make) -> None:
    exported = decoders("qwen2", 4)
    graph = exported.bundle.path / exported.bundle.manifest.graphs["decoder.plain"].file
    kinds = [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]
    assert not {"MatMul", "Gemm", "Reshape"} & set(kinds)
    ids = tokens(9)
    with edgepeft.load(exported.bundle.path) as device:

        def roles() -> list[str]:
            return list(device._sessions._open)

        plain = device.generate_ids(ids, max_new_tokens=8)
        assert roles() == ["decoder.plain"]
        device.generate_ids(ids, adapter="a", max_new_tokens=8)
        assert roles() == ["decoder"]  # the weights are not held twice
        assert device.generate_ids(ids, max_new_tokens=8) == plain
        assert roles() == ["decoder"]


class Reader:
    """Something that goes on using a session, as a stream does."""

    held_bytes = 0

    def close(self) -> None:
        """Nothing is held."""


def test_the_plain_graph_stays_open_while_a_stream_runs_on_it(decoders: Make) -> None:
    ids = tokens(9)
    with edgepeft.load(decoders("qwen2", 4).bundle.path) as device:
        sessions, reader = device._sessions, Reader()
        device.generate_ids(ids, max_new_tokens=2)
        sessions.lend(reader)
        device.generate_ids(ids, adapter="a", max_new_tokens=2)
        assert list(sessions._open) == ["decoder.plain", "decoder"]
        sessions.give_back(reader)
        device.generate_ids(ids, adapter="b", max_new_tokens=2)
        assert list(sessions._open) == ["decoder"]


def test_a_text_longer_than_the_cache_is_refused(decoders: Make) -> None:
    decoder = decoders("llama", 4).decoder({})
    with pytest.raises(edgepeft.UsageError, match=f"{CAPACITY + 1} tokens, the cache holds {CAPACITY}"):
        decoder.read(0, tokens(CAPACITY + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": "gone"}, "no graph 'gone'"),
        ({"graph": "inference"}, "differ in the input"),
        ({"int8_memory": None}, "memory is missing"),
        ({"plain_graph": "decoder"}, "differ in the input"),
        ({"groups": ()}, "differ in the input"),
        ({"first": 10_000}, "from column 10000 on"),
    ],
)
def test_wiring_that_does_not_fit_is_refused(decoders: Make, change: dict[str, Any], message: str) -> None:
    manifest = decoders("llama", 4).bundle.manifest
    wiring = manifest.decoder
    assert wiring is not None
    if "first" in change:
        group = wiring.groups[0]
        slots = (dataclasses.replace(group.slots[0], **change), *group.slots[1:])
        change = {"groups": (dataclasses.replace(group, slots=slots), *wiring.groups[1:])}
    wrong = dataclasses.replace(manifest, decoder=dataclasses.replace(wiring, **change))
    with pytest.raises(edgepeft.BundleError, match=message):
        validate_manifest(wrong)


def test_activations_of_eight_bits_are_near(decoders: Make) -> None:
    exported = decoders("llama", 4)
    ids = tokens(30)
    exact = exported.decoder({}).read(0, ids)
    session = GraphSession(exported.bundle, "decoder.int8")
    session.bind(group_inputs(exported.bundle.manifest, graph_inputs(exported.bundle, [])))
    rounded = InPlaceDecoder(session, exported.bundle.manifest, 1, CAPACITY, CAPACITY).read(0, ids)
    assert 0 < np.abs(rounded - exact).max() < 0.1 * exact.std()
    # So their keys and values are not taken for the exact ones, whichever graph made those.
    made_by = {
        role: origin(exported.bundle.manifest, role, {}) for role in ("decoder", "streamed", "decoder.int8")
    }
    assert made_by["decoder"] == made_by["streamed"] != made_by["decoder.int8"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_a_model_whose_positions_are_not_rotary_generates_as_before(tmp_path: Path, family: str) -> None:
    edgepeft.export(zoo.build(family), tmp_path / "bundle", bits=32, rank=2, train=False, verify=False)
    with edgepeft.load(tmp_path / "bundle") as device:
        assert device.manifest.decoder is None
        assert len(device.generate_ids(tokens(5), max_new_tokens=3)) >= 1
    with pytest.raises(edgepeft.UsageError, match="int8_activations"):
        edgepeft.load(tmp_path / "bundle", int8_activations=True)
