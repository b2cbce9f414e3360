"""Forward passes, adapters and mixtures against numpy."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgepeft
from edgepeft.adapters import Adapter, save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, BudgetError, UsageError
from edgepeft.runtime.session import GraphSession

from . import tiny

IDS = [[3, 4, 5, 0], [7, 8, 9, 10]]
MASK = [[1, 1, 1, 0], [1, 1, 1, 1]]


def expected_logits(adapters: list[tuple[Adapter, float]], head: np.ndarray | None = None) -> np.ndarray:
    """The classifier in float64."""
    stored = {name: value.astype(np.float64) for name, value in tiny.weights().items()}
    mask = np.array(MASK, np.float64)[..., None]
    x = (stored["embedding"][np.array(IDS)] * mask).sum(1) / mask.sum(1)
    z = x @ stored["dense"]
    for adapter, weight in adapters:
        a, b = (adapter.tensors[name].astype(np.float64) for name in (tiny.A, tiny.B))
        z += weight * adapter.scaling(tiny.MODULE) * x @ a.T @ b.T
    return np.tanh(z) @ (stored["classifier.weight"] if head is None else head).T + stored["classifier.bias"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with two trained adapters, `one` with a head and `two` without."""
    two = tiny.adapter(rank=3, seed=5, trained=True)
    lora = {key: value for key, value in two.tensors.items() if "lora" in key}
    adapters = {
        "one": tiny.adapter(rank=2, seed=4, trained=True),
        "two": two.with_tensors(lora, "two"),
        "three": tiny.adapter(rank=1, seed=6, trained=True),
    }
    return tiny.write_bundle(tmp_path / "tiny.edge", adapters=adapters)


def forward(bundle: Path, adapter: Any) -> np.ndarray:
    with edgepeft.load(bundle) as model:
        return model.forward({"input_ids": IDS, "attention_mask": MASK}, adapter)["logits"]


def test_the_base_alone(bundle: Path) -> None:
    """Rank 0 everywhere and the base's own head."""
    np.testing.assert_allclose(forward(bundle, None), expected_logits([]), atol=1e-6)


def test_one_adapter_and_hot_swapping(bundle: Path) -> None:
    """One session, changing adapters between calls; ranks differ."""
    opened = edgepeft.load(bundle)
    one, two = (edgepeft.bundle.reader.open_bundle(bundle).adapter(name) for name in ("one", "two"))
    expected = {
        "one": expected_logits([(one, 1.0)], one.tensors[tiny.HEAD]),
        "two": expected_logits([(two, 1.0)]),
        None: expected_logits([]),
    }
    batch = {"input_ids": IDS, "attention_mask": MASK}
    for name in ("one", "two", None, "two", "one", "one"):
        np.testing.assert_allclose(opened.forward(batch, name)["logits"], expected[name], atol=1e-6)


def test_a_mixture_is_the_weighted_sum(bundle: Path) -> None:
    """By concatenation along the rank axis; the only head among them is used whole."""
    opened = edgepeft.bundle.reader.open_bundle(bundle)
    one, two = opened.adapter("one"), opened.adapter("two")
    expected = expected_logits([(one, 0.7), (two, -0.4)], one.tensors[tiny.HEAD])
    np.testing.assert_allclose(forward(bundle, {"one": 0.7, "two": -0.4}), expected, atol=1e-6)
    np.testing.assert_allclose(
        forward(bundle, {"one": 0, "two": 1}), expected_logits([(two, 1.0)]), atol=1e-6
    )


def test_two_heads_average_when_their_weights_sum_to_one(bundle: Path) -> None:
    """And are refused otherwise, because a replaced parameter is no sum."""
    opened = edgepeft.bundle.reader.open_bundle(bundle)
    one, three = opened.adapter("one"), opened.adapter("three")
    head = 0.25 * one.tensors[tiny.HEAD] + 0.75 * three.tensors[tiny.HEAD]
    expected = expected_logits([(one, 0.25), (three, 0.75)], head)
    np.testing.assert_allclose(forward(bundle, {"one": 0.25, "three": 0.75}), expected, atol=1e-6)
    with pytest.raises(AdapterError, match=r"classifier is replaced by 2 of the mixed adapters.*sum to 0\.8"):
        forward(bundle, {"one": 0.4, "three": 0.4})
    np.testing.assert_allclose(
        forward(bundle, {"one": 2, "two": 2}),
        expected_logits([(one, 2), (opened.adapter("two"), 2)], one.tensors[tiny.HEAD]),
        atol=1e-5,
    )


def test_an_adapter_elsewhere_by_path(bundle: Path, tmp_path: Path) -> None:
    """As text with a separator or as a Path, read anew each time."""
    adapter = tiny.adapter(rank=4, seed=9, trained=True)
    save_adapter(adapter, tmp_path / "mine")
    expected = expected_logits([(adapter, 1.0)], adapter.tensors[tiny.HEAD])
    for spec in (tmp_path / "mine", str(tmp_path / "mine")):
        np.testing.assert_allclose(forward(bundle, spec), expected, atol=1e-6)


def test_an_adapter_without_effect_is_refused(bundle: Path, tmp_path: Path) -> None:
    """One from outside; a bundle's own may be an untrained starting point."""
    save_adapter(tiny.adapter(), tmp_path / "untrained")
    with pytest.raises(AdapterError, match="has no effect: every lora_B is zero"):
        forward(bundle, tmp_path / "untrained")
    save_adapter(tiny.adapter(), bundle / "adapters" / "untrained")
    with pytest.raises(AdapterError, match="has no effect"):
        forward(bundle, "untrained")


def test_a_starting_adapter_of_the_bundle_may_run(classifier: Path) -> None:
    """It changes nothing yet."""
    np.testing.assert_allclose(forward(classifier, "mine"), expected_logits([]), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"one": float("nan")}, "weight is nan"),
        ({"one": "0.5"}, "weight is '0.5'"),
        ({"one": True}, "weight is True"),
    ],
)
def test_weights_must_be_numbers(bundle: Path, spec: Any, message: str) -> None:
    """Not texts, not NaN."""
    with pytest.raises(UsageError, match=message):
        forward(bundle, spec)


def test_defaults_are_those_of_transformers(classifier: Path) -> None:
    """A mask of ones."""
    with edgepeft.load(classifier) as model:
        plain = model.forward({"input_ids": [[1, 2, 3]]})["logits"]
        masked = model.forward({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]})["logits"]
    assert np.array_equal(plain, masked)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "lacks the input"),
        ({"input_ids": [[1]], "pixel_values": [[1]]}, "takes no input 'pixel_values'"),
        ({"input_ids": [[1]], tiny.A: [[1]]}, "takes no input"),
        ({"input_ids": [[1.5]]}, "is of dtype float64, expected int64"),
        ({"input_ids": [["a"]]}, "is of dtype"),
        ({"input_ids": [1, 2]}, r"has shape \[2\]"),
        ({"input_ids": [[1, 2], [3]]}, "rows of different lengths"),
        ({"input_ids": np.zeros((0, 4), np.int64)}, "is empty"),
        ({"input_ids": [[1, 24]]}, "holds token 24, the vocabulary has 24 tokens"),
        ({"input_ids": [[-1, 2]]}, "holds token -1"),
        ({"input_ids": [[1] * 17]}, "has 17 tokens a row, the model takes at most 16"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "they must agree"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, "they must agree"),
        ({"input_ids": [[1, 2]], "labels": [1]}, "takes no input 'labels'"),
    ],
)
def test_inputs_are_checked_before_the_graph_sees_them(
    classifier: Path, batch: dict[str, Any], message: str
) -> None:
    """Names, dtypes, shapes, ranges."""
    with edgepeft.load(classifier) as model, pytest.raises(UsageError, match=message):
        model.forward(batch)


def test_any_integer_dtype_and_layout_is_taken(classifier: Path) -> None:
    """int32, booleans for the mask, and arrays that are not contiguous."""
    ids = np.asfortranarray(np.array(IDS, np.int32))
    with edgepeft.load(classifier) as model:
        got = model.forward({"input_ids": ids, "attention_mask": np.array(MASK, bool)})["logits"]
    np.testing.assert_allclose(got, expected_logits([]), atol=1e-6)


def test_a_budget_refuses_a_batch_before_it_runs(classifier: Path) -> None:
    """The error names what would do."""
    with edgepeft.load(classifier, memory_budget="2MiB") as model, pytest.raises(BudgetError) as caught:
        model.forward({"input_ids": IDS})
    assert caught.value.budget_bytes == 2 * 2**20
    with edgepeft.load(classifier, memory_budget=caught.value.required_bytes + 2**24) as model:
        assert model.forward({"input_ids": IDS})["logits"].shape == (2, 3)


def test_a_closed_model_opens_again(classifier: Path) -> None:
    """Closing frees the session, the next call makes another."""
    model = edgepeft.load(classifier)
    first = model.forward({"input_ids": IDS})["logits"]
    model.close()
    model.close()
    assert np.array_equal(model.forward({"input_ids": IDS})["logits"], first)
    model.close()


def test_a_session_lets_go_of_what_it_was_given(classifier: Path) -> None:
    """Weights that are read into buffers are handed over for one run; the buffers must not outlive it."""
    session = GraphSession(open_bundle(classifier), "inference", threads=1)
    array = np.ones((1, 4), np.int64)
    seen = weakref.ref(array)
    session.bind({"input_ids": array})
    del array
    assert seen() is not None
    session.unbind()
    assert seen() is None
    session.close()
