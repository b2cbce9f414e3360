"""Cutting a forward graph into stages, and the chain of stages against the one graph they came from."""

import dataclasses
import functools
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.exporters.partition.cuts import cut, dependences
from edgepeft.exporters.partition.signature import find_period
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.inputs import check_batch, model_inputs
from edgepeft.runtime.memory.chain_cost import ChainCost
from edgepeft.runtime.memory.plan import NOTHING_HELD, Held, Plan, Workload
from edgepeft.runtime.memory.process import MemoryRecorder
from edgepeft.runtime.training.gradients.chain import Chain
from edgepeft.runtime.training.gradients.strategies import GradientSession
from edgepeft.runtime.training.state.buffers import TrainingState

from .. import models


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("", (0, 0, 0)),
        ("abc", (0, 0, 0)),
        ("eabababh", (1, 2, 3)),
        ("eaaaah", (1, 1, 4)),
        ("abcabcd", (0, 3, 2)),
        ("aabcbcbc", (2, 2, 3)),
    ],
)
def test_the_longest_repetition_is_found(texts: str, expected: tuple[int, int, int]) -> None:
    assert find_period(texts) == expected


@given(
    st.text("ab", max_size=4),
    st.text("ab", min_size=1, max_size=3),
    st.integers(2, 5),
    st.text("ab", max_size=4),
)
def test_what_is_found_repeats_and_covers_at_least_what_was_put_in(
    before: str, unit: str, count: int, behind: str
) -> None:
    texts = before + unit * count + behind
    start, length, found = find_period(texts)
    assert texts[start : start + length] * found == texts[start : start + length * found]
    assert length * found >= len(unit) * count


def test_cuts_lie_where_every_path_passes_and_masks_are_shared() -> None:
    """x → (a, b) → join → (c, residual) → out: join is a cut, c is none, the mask is in no segment."""
    graph = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        agraph (int64[2] ids, float[2] raw) => (float[2] out) <float[9] table = {1,2,3,4,5,6,7,8,9}> {
            x = Gather(table, ids)
            mask = Neg(raw)
            a = Relu(x)
            b = Mul(x, mask)
            join = Add(a, b)
            c = Mul(join, mask)
            out = Add(join, c)
        }
        """
    ).graph
    for node in graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
    segments = cut(graph, graph.outputs[0], dependences(graph, {"table"}, set()))
    assert [segment.output.name for segment in segments] == ["x", "join", "out"]
    assert [[node.outputs[0].name for node in segment.nodes] for segment in segments] == [
        ["x"],
        ["a", "b", "join"],
        ["c", "out"],
    ]


def both_ways(folder: Path, batch: models.Batch) -> tuple[float, float, TrainingState, TrainingState]:
    """Loss and gradients by the resident graph and by the chain, every adapter tensor filled at random."""
    bundle = open_bundle(folder)
    arrays = check_batch(
        bundle.manifest, model_inputs(bundle.manifest, bundle.manifest.graphs["train"].inputs), batch.arrays
    )
    rng = np.random.default_rng(0)
    inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
    start = {
        name: 0.1 * rng.standard_normal(inputs[name].shape, np.float32)
        for name in bundle.manifest.policy.trainable
    }
    resident, staged = TrainingState(start), TrainingState(start)
    losses = []
    graph = GradientSession(bundle, "train", inputs, resident)
    losses.append(graph.run(arrays))
    graph.close()
    chain = Chain(bundle, {**inputs, **staged.parameters})
    losses.append(chain.gradients(arrays, staged))
    evaluated = chain.evaluate(arrays)
    assert evaluated["loss"] == pytest.approx(losses[0], rel=1e-6, abs=2e-6)
    chain.close()
    weights = weakref.ref(chain._run.weights)
    del chain
    assert (
        weights() is None
    )  # and with them the file, which Windows neither replaces nor deletes while it is mapped
    return losses[0], losses[1], resident, staged


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("kind", ["classifier", "encoder", "decoder"])
def test_a_chain_gives_the_gradients_of_the_one_graph(kind: str, bits: int, tmp_path: Path) -> None:
    model, batch = {
        "classifier": (models.bert_classifier(), models.batch(labels=3)),
        "encoder": (models.bert_encoder(), models.batch()),
        "decoder": (models.llama(tied=True), models.batch(labels="tokens")),
    }[kind]
    edgepeft.export(model, tmp_path / "bundle", bits=bits, rank=4, verify=False)
    loss, staged_loss, resident, staged = both_ways(tmp_path / "bundle", batch)
    assert staged_loss == pytest.approx(loss, rel=1e-6, abs=2e-6)
    for name, expected in resident.gradients.items():
        got = staged.gradients[name]
        # Products of 4-bit weights are summed in another order by MatMulNBits than by the decoded product.
        assert np.linalg.norm(got - expected) <= 1e-5 * max(np.linalg.norm(expected), 1e-3), name
    wiring = open_bundle(tmp_path / "bundle").manifest.partition
    assert wiring is not None
    layers = [stage for stage in wiring.stages if stage.adapter]
    assert len(layers) == 2
    assert layers[0].forward == layers[1].forward  # equal layers share a graph
    assert (wiring.vocabulary_head is not None) == (kind == "decoder" and bits == 4)
    # Of word and token-type embeddings rows are read; the positions' are not the caller's to name.
    looked_up = {
        key.split(".weight")[0]: wiring.stages[0].lookups[name]
        for name, key in wiring.stages[0].weights.items()
        if name in wiring.stages[0].lookups
    }
    assert set(looked_up.values()) == {"input_ids", *(["token_type_ids"] if kind != "decoder" else [])}
    assert not any("position" in key for key in looked_up)
    assert not any(stage.lookups for stage in wiring.stages_and_head[1:])


def test_the_backward_pass_ends_at_the_lowest_trained_stage(tmp_path: Path) -> None:
    """Training the upper layer alone gives its gradients and opens no backward session for the lower one."""
    edgepeft.export(models.llama(tied=False), tmp_path / "bundle", rank=2, verify=False)
    bundle = open_bundle(tmp_path / "bundle")
    inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
    batch = models.batch(labels="tokens").arrays
    full = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
    upper = TrainingState({name: value for name, value in full.parameters.items() if ".layers.1." in name})
    chain = Chain(bundle, inputs)
    chain.gradients(batch, full)
    chain.gradients(batch, upper)
    for name, got in upper.gradients.items():
        np.testing.assert_array_equal(got, full.gradients[name])
    chain.close()


def test_a_slice_of_the_vocabulary_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 7 rows, the last one shorter, give what one slice gives."""
    edgepeft.export(models.llama(tied=True), tmp_path / "bundle", rank=2, verify=False)
    batch = models.batch(labels="tokens")
    loss, whole, _, whole_state = both_ways(tmp_path / "bundle", batch)
    monkeypatch.setattr(
        "edgepeft.runtime.training.gradients.sliced_head.SLICE_VALUES", 7 * models.SIZES["hidden_size"]
    )
    _, sliced, _, sliced_state = both_ways(tmp_path / "bundle", batch)
    assert sliced == pytest.approx(whole, rel=1e-6)
    assert sliced == pytest.approx(loss, rel=1e-6)
    for name, expected in whole_state.gradients.items():
        assert np.linalg.norm(sliced_state.gradients[name] - expected) <= 1e-5 * np.linalg.norm(expected), (
            name
        )


def test_weights_that_have_no_blocks_have_a_cost(tied_llama: Path) -> None:
    """A file may have a scale for a whole row: its blocks have size 0."""
    manifest = open_bundle(tied_llama).manifest
    assert manifest.partition is not None
    costs = []
    for block_size in (0, 32):
        quantized = dataclasses.replace(manifest.quantization, block_size=block_size)
        cost = ChainCost(
            dataclasses.replace(manifest, quantization=quantized),
            manifest.partition,
            Workload(rows=1, seq_len=8, rank=4, adapter_values=1, trained_values=1),
        )
        costs.append(cost.relative_step(NOTHING_HELD))
    assert costs[0] == pytest.approx(costs[1], rel=0.1)


RECORDS = [{"input_ids": row.tolist()} for row in np.random.default_rng(0).integers(3, 300, (12, 12))]


def test_every_way_to_train_learns_the_same(
    tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident, in stages that hold all, some or nothing, and with the state in a file: the same losses."""
    reports = {}

    def forced(label: str, held: Held, candidates: list[Plan], *_: object) -> Plan:
        plan = next(plan for plan in candidates if plan.label.startswith(label))
        return dataclasses.replace(plan, held=held)

    for label, held in {
        "resident": NOTHING_HELD,
        "checkpointed": Held(stages=100, weights=True),
        "checkpointed,": Held(stages=1, weights=True),
        "streamed": NOTHING_HELD,
        "streamed, state in a file": NOTHING_HELD,
        "streamed, state in a file, 1 input in 2 kept": Held(stride=2),
    }.items():
        monkeypatch.setattr(
            "edgepeft.runtime.training.preparation.choose", functools.partial(forced, label, held)
        )
        with edgepeft.load(tied_llama, memory_budget="2GiB") as device:
            folder = tmp_path / label.replace(" ", "-")
            reports[label] = device.adapt(RECORDS, folder, steps=12, batch_size=4, learning_rate=5e-3)
        assert reports[label].strategy.startswith(label.rstrip(","))
    resident, *chains = reports.values()
    for chain in chains:
        np.testing.assert_allclose(chain.losses, resident.losses, rtol=1e-4)
        assert chain.held_out_after.loss == pytest.approx(resident.held_out_after.loss, rel=1e-3)
        np.testing.assert_allclose(chain.losses, chains[0].losses, rtol=1e-6)
    assert chains[-1].losses == chains[-2].losses == chains[-3].losses
    assert not list(tmp_path.glob("*.checkpoint"))


def test_near_its_budget_an_update_steps_down_and_learns_the_same(
    tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process seems to hold 99 % of the budget after every step until nothing cheaper is left."""
    with edgepeft.load(tied_llama, memory_budget="2GiB") as device:
        expected = device.adapt(RECORDS, tmp_path / "a", steps=12, batch_size=4, learning_rate=5e-3)
        assert expected.stepped_down == []
        monkeypatch.setattr(MemoryRecorder, "recent_peak_bytes", int(0.99 * 2**31))
        report = device.adapt(RECORDS, tmp_path / "b", steps=12, batch_size=4, learning_rate=5e-3)
    ways = [change.after.split(",")[0] for change in report.stepped_down]
    assert ways == sorted(ways)
    assert set(ways) == {"checkpointed", "streamed"}
    assert [change.step for change in report.stepped_down] == list(range(1, len(ways) + 1))
    assert report.strategy == report.stepped_down[-1].after == "streamed, state in a file, 1 input in 4 kept"
    # Each with its own prediction: the first plan's first, the last one's beside the last one's name.
    predicted = [change.predicted_peak_bytes for change in report.stepped_down]
    assert predicted[0] == pytest.approx(expected.memory.predicted_peak_bytes, rel=0.02)
    first, last = expected.memory.predicted, report.memory.predicted
    assert last["activation_bytes"] < first["activation_bytes"]
    assert last["state_bytes"] != first["state_bytes"]
    assert min(last.values()) >= 0
    np.testing.assert_allclose(report.losses, expected.losses, rtol=1e-4)


LETS_GO = """
import sys
import numpy as np
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.memory.plan import Held
from edgepeft.runtime.memory.arena import renew_shared_arena
from edgepeft.runtime.memory.process import read_memory
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.gradients.chain import Chain

bundle = open_bundle(sys.argv[1])
inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
chain = Chain(bundle, inputs, held=Held(stages=100))
state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
ids = np.ones((64, 128), np.int64)
chain.gradients({"input_ids": ids, "attention_mask": ids, "labels": ids}, state)
chain.close()
before_bytes = read_memory().resident_bytes
renew_shared_arena()
shrunk = read_memory()
print(before_bytes - shrunk.resident_bytes)
chain = Chain(bundle, inputs)
chain.evaluate({"input_ids": ids[:1], "attention_mask": ids[:1], "labels": ids[:1]})
print(read_memory().resident_bytes - shrunk.resident_bytes)
"""


def test_what_steps_down_gives_its_memory_back(tied_llama: Path) -> None:
    """The arena that a chain's sessions share keeps what it once had, until it is told to let go; then it
    takes what the next batch needs.

    In a process of its own: what other tests leave in this one's heap would hide it.
    """
    command = [sys.executable, "-c", LETS_GO, str(tied_llama)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, taken_again = map(int, done.stdout.split())
    assert given_back > 10 * 2**20
    assert taken_again < 10 * 2**20, "the next batch is small"


MIXED_LENGTHS = """
import sys
import numpy as np
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.adapters.graph_inputs import graph_inputs
from edgepeft.runtime.memory.process import read_memory
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.gradients.chain import Chain

bundle = open_bundle(sys.argv[1])
inputs = graph_inputs(bundle, [(bundle.adapter("default"), 1.0)])
state = TrainingState({name: inputs[name] for name in bundle.manifest.policy.trainable})
chain = Chain(bundle, inputs, threads=1)
before = read_memory().anonymous_bytes
for length in map(int, sys.argv[2:]):
    ids = np.full((32, length), 5, np.int64)
    chain.gradients({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}, state)
print(read_memory().anonymous_bytes - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory")
def test_mixed_lengths_take_what_the_longest_takes(tied_llama: Path) -> None:
    """Whatever came before it: the arena keeps no place for each size that it once had."""

    def taken(*lengths: int) -> int:
        command = [sys.executable, "-c", MIXED_LENGTHS, str(tied_llama), *map(str, lengths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        return int(done.stdout)

    longest = taken(256)
    assert longest > 16 * 2**20
    assert taken(*range(16, 257, 24), 256) < 1.1 * longest
