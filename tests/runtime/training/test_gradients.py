"""Loss and gradients of a batch against torch's autograd on the same tiny models."""

from pathlib import Path

import numpy as np
import pytest
import torch

import edgepeft
from edgepeft.errors import AdapterError, UsageError

from .. import tiny
from ..torch_tiny import TorchClassifier, TorchLanguageModel

CLASSES = {
    "input_ids": [[3, 4, 5, 0], [7, 8, 9, 10]],
    "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
    "labels": [2, 0],
}
TOKENS = {
    "input_ids": [[3, 4, 5, 0], [7, 8, 9, 10]],
    "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
    "labels": [[3, 4, 5, -100], [-100, -100, 9, 10]],
}


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_gradients_are_torchs_in_pefts_layout(tmp_path: Path, task: str) -> None:
    """Every trainable tensor, saved modules included."""
    adapter = tiny.adapter(rank=3, trained=True, task=task)
    bundle = tiny.write_bundle(tmp_path / "b", task, adapters={"mine": adapter})
    batch = CLASSES if task == "text-classification" else TOKENS
    reference = (TorchClassifier if task == "text-classification" else TorchLanguageModel)(adapter)
    expected = reference.loss(batch)
    expected.backward()
    with edgepeft.load(bundle) as model:
        for _ in range(2):  # the second call reuses the session
            loss, gradients = model.loss_and_gradients(batch, adapter="mine")
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            assert gradients.keys() == reference.parameters.keys()
            for key, gradient in gradients.items():
                want = reference.parameters[key].grad.numpy()
                assert gradient.shape == adapter.tensors[key].shape
                np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6)


def test_forward_and_gradients_take_turns(classifier: Path) -> None:
    """Under a budget, where only one session is open at a time, and without."""
    for budget in (None, "4GiB"):
        with edgepeft.load(classifier, memory_budget=budget) as model:
            for _ in range(2):
                loss, _ = model.loss_and_gradients(CLASSES, adapter="mine")
                logits = model.forward(
                    {key: CLASSES[key] for key in ("input_ids", "attention_mask")}, "mine"
                )["logits"]
                expected = torch.nn.functional.cross_entropy(
                    torch.from_numpy(logits), torch.tensor(CLASSES["labels"])
                )
                assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_what_has_no_gradients(classifier: Path, encoder: Path) -> None:
    """A mixture, a bundle without training graphs, an adapter that is not there."""
    with edgepeft.load(classifier) as model:
        with pytest.raises(UsageError, match="not of a mixture"):
            model.loss_and_gradients(CLASSES, adapter={"mine": 0.5})  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match="has no adapter 'yours'"):
            model.loss_and_gradients(CLASSES, adapter="yours")
    with edgepeft.load(encoder) as model, pytest.raises(UsageError, match="--no-train"):
        model.loss_and_gradients({"input_ids": [[1]]})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3, 0], "holds 3, the model has 3 labels"),
        ([-1, 0], "holds -1"),
        ([0], "they must agree"),
        (None, "lacks"),
    ],
)
def test_labels_are_checked(classifier: Path, labels: list[int] | None, message: str) -> None:
    """Range and count."""
    batch = {**CLASSES, "labels": labels}
    if labels is None:
        del batch["labels"]
    with edgepeft.load(classifier) as model, pytest.raises(UsageError, match=message):
        model.loss_and_gradients(batch, adapter="mine")


def test_labels_that_leave_nothing_to_learn(language_model: Path) -> None:
    """All of them -100, which would be a division by zero."""
    batch = {"input_ids": [[1, 2]], "labels": [[5, -100]]}
    with edgepeft.load(language_model) as model, pytest.raises(UsageError, match="no loss to compute"):
        model.loss_and_gradients(batch, adapter="mine")
