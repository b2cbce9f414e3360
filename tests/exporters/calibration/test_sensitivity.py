"""What is said to be lost with a weight, against what is lost when that one alone is rounded."""

import copy
import itertools

import numpy as np
import pytest
import torch

from edgepeft.exporters.calibration.allocate import Choice, allocate
from edgepeft.exporters.calibration.sensitivity import sensitivities
from edgepeft.exporters.quantize.blockwise import quantize
from edgepeft.exporters.quantize.layouts import QuantizedWeight

from .. import models


def rounded(weight: torch.Tensor, importance: torch.Tensor | None) -> QuantizedWeight:
    return quantize(weight, 4, 32, importance)


def texts(count: int, seed: int) -> torch.Tensor:
    return torch.randint(300, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_divergence_of_a_language_model(tied: bool) -> None:
    """Of its predictions: exact, over all tokens, for each weight."""
    model = models.llama(tied=tied)
    ids = texts(40, 0)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = sensitivities(model, [{"input_ids": part} for part in ids.split(10)], names, rounded, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(weight.grad is not None for weight in model.parameters())
    assert ("lm_head" in found) != tied

    exact = model(ids).logits.detach().log_softmax(-1)
    lost = {}
    for name in found:
        changed = copy.deepcopy(model)
        weight = changed.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(quantize(weight, 4, 32).dequantize())
            said = changed(ids).logits.log_softmax(-1)
        lost[name] = float((exact.exp() * (exact - said)).sum(-1).mean())
    ratios = [found[name] / lost[name] for name in found]
    assert min(ratios) > 0.7
    assert max(ratios) < 1.4
    assert float(np.median(ratios)) == pytest.approx(1, abs=0.15)


def test_of_an_encoder_it_is_the_squared_change() -> None:
    model = models.bert_encoder()
    ids = texts(60, 1)
    names = [
        "embeddings.word_embeddings",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.1.output.dense",
    ]
    feeds = [{"input_ids": part} for part in ids.split(20)]
    found = sensitivities(model, feeds, names, rounded, seed=0)
    exact = model(ids)[0].detach()
    for name in names:
        changed = copy.deepcopy(model)
        weight = changed.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(quantize(weight, 4, 32).dequantize())
            lost = float((changed(ids)[0] - exact).square().sum(-1).mean()) / 2
        assert found[name] == pytest.approx(lost, rel=0.3)


def taken(choices: dict[str, Choice], bits: dict[str, int]) -> int:
    return sum(choice.bytes_8 if bits[name] == 8 else choice.bytes_4 for name, choice in choices.items())


def lost(choices: dict[str, Choice], bits: dict[str, int]) -> float:
    return sum(choice.loss for name, choice in choices.items() if bits[name] == 4)


def test_bytes_go_where_most_is_lost() -> None:
    """Never more than there are; and as good as the best of all choices, up to the one that does not fit."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 30, 10)
        choices = {
            f"w{index}": Choice(int(size) * 4, int(size) * 8, float(loss))
            for index, (size, loss) in enumerate(zip(sizes, rng.exponential(size=10), strict=True))
        }
        least = int(sizes.sum()) * 4
        size_bytes = least + int(rng.integers(0, least))
        bits = allocate(choices, size_bytes)
        assert taken(choices, bits) <= size_bytes
        every = [dict(zip(choices, each, strict=True)) for each in itertools.product((4, 8), repeat=10)]
        best = min(lost(choices, each) for each in every if taken(choices, each) <= size_bytes)
        assert lost(choices, bits) <= best + max(choice.loss for choice in choices.values())
    assert set(allocate(choices, 0).values()) == {4}
    assert set(allocate(choices, 10**6).values()) == {8}
