"""GPTQ against plain numpy."""

import numpy as np
import pytest
import torch

from edgepeft.exporters.quantize import gptq as gptq_module
from edgepeft.exporters.quantize.blockwise import fit_blocks, quantize
from edgepeft.exporters.quantize.gptq import DAMPING, InputStatistics, gptq


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Values of which some directions hold most, and some columns much more than others."""
    mixture = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    mixture *= torch.logspace(0, -2, columns)[:, None] * torch.linspace(0.3, 3, columns)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) @ mixture


def by_hand(weight: np.ndarray, exact: np.ndarray, read: np.ndarray, block_size: int) -> np.ndarray:
    """The paper's method a column at a time, in float64: the inverse of what is left of the Hessian is
    computed anew for each. Only scales and zero points of a block are the exporter's own."""

    def damped(rows: slice) -> np.ndarray:
        hessian = read[rows].T @ read[rows]
        return np.asarray(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian)))

    def least_squares(rows: slice) -> np.ndarray:
        wanted = (exact[rows] - read[rows]) @ weight.T
        return np.linalg.solve(damped(rows), read[rows].T @ wanted).T

    half, others = slice(len(read) // 2), slice(len(read) // 2, None)
    effect = (read[others] @ least_squares(half).T).ravel()
    wanted = ((exact[others] - read[others]) @ weight.T).ravel()
    fraction = np.clip(effect @ wanted / (effect @ effect), 0, 1)
    assert 0.1 < fraction < 1
    hessian = damped(slice(None))
    left = weight + fraction * least_squares(slice(None))
    importance = np.diag(hessian).reshape(-1, block_size)
    columns = [
        block * block_size + column
        for block in np.argsort(-importance.sum(1))
        for column in np.argsort(-importance[block])
    ]
    result = np.zeros_like(weight)
    for position, column in enumerate(columns):
        if position % block_size == 0:
            block = sorted(columns[position : position + block_size])
            fitted = fit_blocks(
                torch.from_numpy(left[:, block]).float(),
                4,
                torch.float16,
                torch.from_numpy(np.diag(hessian)[block]).float(),
            )
            scales, zero_points = (one.double().numpy() for one in fitted)
        rest = columns[position:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        codes = np.clip(np.round(left[:, column] / scales) + zero_points, 0, 15)
        result[:, column] = (codes - zero_points) * scales
        error = (left[:, column] - result[:, column]) / inverse[0, 0]
        left[:, rest] -= np.outer(error, inverse[0])
    return result


def test_it_is_the_papers_method() -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    exact = correlated(300, 64, seed=1)
    read = 0.95 * exact + 0.05 * correlated(300, 64, seed=2)
    halves = InputStatistics.empty(64), InputStatistics.empty(64)
    for part in range(0, 300, 50):
        halves[part // 150].add(exact[part : part + 50], read[part : part + 50])
    parts = gptq([weight[:5], weight[5:]], halves, [4, 4], 16)
    assert [part.shape for part in parts] == [(5, 64), (7, 64)]
    got = np.concatenate([part.dequantize().numpy() for part in parts])
    expected = by_hand(*(value.double().numpy() for value in (weight, exact, read)), block_size=16)
    # A value between two codes may go either way in float32, and changes those after it in its row.
    same = [np.allclose(*rows, atol=1e-4) for rows in zip(got, expected, strict=True)]
    assert sum(same) >= 10


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_on_other_inputs_are_nearer_than_by_rounding(bits: int) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    halves = InputStatistics.empty(128), InputStatistics.empty(128)
    rows = correlated(600, 128, seed=1)
    halves[0].add(rows, rows)
    others = correlated(200, 128, seed=2)
    (calibrated,) = gptq([weight], halves, [bits], 32)
    errors = [
        float((others @ (found.dequantize() - weight).T).square().mean())
        for found in (calibrated, quantize(weight, bits, 32))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_weights_of_a_group_may_have_different_bits() -> None:
    weights = [torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    halves = InputStatistics.empty(64), InputStatistics.empty(64)
    for seed, half in enumerate(halves):
        half.add(correlated(300, 64, seed), 0.9 * correlated(300, 64, seed))
    mixed = gptq(weights, halves, [4, 8], 32)
    alike = gptq(weights, halves, [4, 4], 32)
    assert [weight.bits for weight in mixed] == [4, 8]
    assert np.array_equal(mixed[0].packed, alike[0].packed)
    assert mixed[1].zero_points is None


def test_many_rows_are_rounded_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    halves = InputStatistics.empty(64), InputStatistics.empty(64)
    halves[0].add(correlated(300, 64, 1), correlated(300, 64, 1))
    (whole,) = gptq([weight], halves, [4], 32)
    monkeypatch.setattr(gptq_module, "_WEIGHTS_AT_A_TIME", 64 * 7)
    (parts,) = gptq([weight], halves, [4], 32)
    # Products of other shapes may differ in a last digit, and so may a code between two.
    assert (whole.packed == parts.packed).mean() > 0.99
    np.testing.assert_allclose(whole.scales.decoded(), parts.scales.decoded(), rtol=1e-2)
