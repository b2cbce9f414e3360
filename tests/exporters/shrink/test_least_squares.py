"""Which columns go and what the others make up for, against numpy's least squares."""

import numpy as np
import pytest
import torch

from edgepeft.exporters.shrink.least_squares import DAMPING, InputMoments, choose, narrowed

ROWS, WIDTH, OUT = 400, 12, 5


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a linear reads, whose columns say much of one another and are not centered; weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(ROWS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    inputs = mixed * torch.linspace(0.3, 2, WIDTH) + torch.randn(WIDTH, generator=generator)
    return inputs, torch.randn(OUT, WIDTH, generator=generator), torch.randn(OUT, generator=generator)


def moments(inputs: torch.Tensor) -> InputMoments:
    """Counted in two parts."""
    found = InputMoments.empty(WIDTH)
    for part in inputs.split(ROWS // 2 + 3):
        found.add(part[None])
    return found


def solved(inputs: np.ndarray, weight: np.ndarray, kept: list[int]) -> tuple[np.ndarray, float]:
    """numpy's weights of the kept columns, and the squares that remain: rows below the inputs stand for the
    damping."""
    damping = (DAMPING * np.square(inputs).sum(0).mean()) ** 0.5 * np.eye(WIDTH)
    rows = np.vstack([inputs, damping])
    found, remaining, *_ = np.linalg.lstsq(rows[:, kept], rows @ weight.T, rcond=None)
    return found.T, float(remaining.sum())


@pytest.mark.parametrize("biased", [False, True])
def test_the_columns_that_are_left_make_up_for_the_others(biased: bool) -> None:
    """As numpy has them; with a bias, of what differs from the mean."""
    inputs, weight, bias = drawn()
    found = narrowed(weight, bias if biased else None, moments(inputs), 7)
    values = inputs.double().numpy()
    centered = values - values.mean(0) if biased else values
    kept = found.kept.tolist()
    expected, _ = solved(centered, weight.double().numpy(), kept)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=0, atol=1e-4)
    made, before = values[:, kept] @ expected.T, values @ weight.double().numpy().T
    if biased:
        assert found.bias is not None
        shift = (before - made).mean(0)
        np.testing.assert_allclose(found.bias.numpy(), bias.numpy() + shift, rtol=0, atol=1e-3)
        made, before = made + shift, before + 0.0
        before_varies = before - before.mean(0)
    else:
        assert found.bias is None
        before_varies = before
    lost = np.square(made - before).sum() / np.square(before_varies).sum()
    assert found.error == pytest.approx(lost**0.5, rel=1e-3)


def test_each_column_that_goes_is_the_one_that_costs_least() -> None:
    """Of all that could go next, once the others make up for it."""
    inputs, weight, _ = drawn(1)
    values, target = inputs.double().numpy(), weight.double().numpy()
    hessian = moments(inputs).products.double()
    damping = DAMPING * float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping)
    left = list(range(WIDTH))
    for kept in range(WIDTH - 1, 2, -1):
        costs = {}
        for gone in left:
            _, cost = solved(values, target, [one for one in left if one != gone])
            # What λ alone costs is what is left of the weight once the others have taken what they can.
            moved, _ = solved(values, target, left)
            costs[gone] = cost - damping * np.square(moved[:, left.index(gone)]).sum()
        left.remove(min(costs, key=costs.__getitem__))
        assert choose(weight, hessian, damping, kept).tolist() == left


def test_a_copy_costs_nothing() -> None:
    """Two columns that are always the same: one goes, and the other takes its weight."""
    inputs, weight, _ = drawn(2)
    inputs[:, 4] = inputs[:, 9]
    found = narrowed(weight, None, moments(inputs), WIDTH - 1)
    assert (set(range(WIDTH)) - set(found.kept.tolist())) < {4, 9}
    assert found.error < 0.02
