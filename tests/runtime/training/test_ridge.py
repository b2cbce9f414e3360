"""Ridge regression against scikit-learn, leaving out against doing it, and shuffled labels."""

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import Ridge as Reference

from edgepeft.runtime.training.head import ridge
from edgepeft.runtime.training.head.ridge import Fit, Ridge

FloatArray = npt.NDArray[np.float64]


def squared(scores: FloatArray, targets: FloatArray) -> FloatArray:
    return np.asarray(np.square(scores - targets).mean(axis=1))


def cross_entropy(scores: FloatArray, targets: FloatArray) -> FloatArray:
    return np.asarray(np.logaddexp.reduce(scores, axis=1) - (scores * targets).sum(axis=1))


def problem(
    count: int, width: int, outputs: int, seed: int = 0
) -> tuple[npt.NDArray[np.float32], FloatArray, FloatArray]:
    """Features around another mean than 0, targets that they explain in part, weights."""
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((count, width)) * rng.uniform(0.1, 3, width) + 2).astype(np.float32)
    targets = features @ rng.standard_normal((width, outputs)) + rng.standard_normal((count, outputs))
    return features, targets, rng.uniform(0.5, 2, count)


def fitted(
    features: npt.NDArray[np.float32], targets: FloatArray, weights: FloatArray, origin: float | None = None
) -> tuple[Ridge, Fit]:
    found = Ridge(features.shape[1], targets.shape[1], len(features), origin=origin)
    for start in range(0, len(features), 7):
        part = slice(start, start + 7)
        found.add(features[part], targets[part], weights[part])
    return found, found.fit(squared, scales=(1.0,))


def reference(alpha: float, origin: float | None) -> Reference:
    return Reference(alpha=alpha, fit_intercept=origin is None)


@pytest.mark.parametrize("origin", [None, 0.25])
@pytest.mark.parametrize(("count", "kept"), [(20, 20), (90, 90), (90, 25)])
def test_it_is_scikit_learns(
    count: int, kept: int, origin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer records than features, with more, and with more than are kept; with a bias and without."""
    features, targets, weights = problem(count, 32, 3)
    monkeypatch.setattr(ridge, "KEPT_BYTES", kept * 32 * 4)
    _, fit = fitted(features, targets, weights, origin)
    expected = reference(fit.alpha, origin).fit(
        features.astype(np.float64), targets - (origin or 0), sample_weight=weights
    )
    np.testing.assert_allclose(fit.weight, expected.coef_, atol=1e-4)
    np.testing.assert_allclose(fit.bias, expected.intercept_ + (origin or 0), atol=1e-4)
    assert len(fit.left_out) == kept


@pytest.mark.parametrize("origin", [None, 0.25])
@pytest.mark.parametrize("count", [20, 90])
def test_a_record_that_was_left_out_was(count: int, origin: float | None) -> None:
    features, targets, weights = problem(count, 32, 3)
    _, fit = fitted(features, targets, weights, origin)
    for index in (0, 7, count - 1):
        others = np.arange(count) != index
        without = reference(fit.alpha, origin).fit(
            features[others].astype(np.float64),
            targets[others] - (origin or 0),
            sample_weight=weights[others],
        )
        wide = features[index : index + 1].astype(np.float64)
        expected = without.predict(wide)[0] + (origin or 0)
        np.testing.assert_allclose(fit.left_out[index], expected, atol=1e-4)


def test_the_penalty_is_the_one_that_leaving_out_prefers() -> None:
    features, targets, weights = problem(60, 32, 2)
    _, fit = fitted(features, targets, np.ones(60))
    del weights
    wide = features.astype(np.float64)

    def left_out(alpha: float) -> float:
        folds = [np.arange(60) != index for index in range(60)]
        errors = [
            Reference(alpha=alpha).fit(wide[fold], targets[fold]).predict(wide[~fold]) - targets[~fold]
            for fold in folds
        ]
        return float(np.square(errors).mean())

    assert left_out(fit.alpha) == pytest.approx(fit.loss, rel=1e-6)
    assert fit.loss <= min(left_out(fit.alpha * 10), left_out(fit.alpha / 10)) + 1e-12


def test_shuffled_labels_are_noticed() -> None:
    """Labels that say nothing pass once in twenty times; those that say something always."""
    passed = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        features = rng.standard_normal((24, 64)).astype(np.float32)
        targets = np.eye(3)[rng.permutation(np.arange(24) % 3)]
        found = Ridge(64, 3, 24, seed)
        found.add(features, targets, np.ones(24))
        fit = found.fit(cross_entropy)
        passed += found.beats_shuffled(fit.loss, cross_entropy)
    assert passed <= 11  # of 100 with a probability of 1 in 20: more than 11 once in 250 runs
    classes = np.arange(24) % 3
    features = rng.standard_normal((24, 64)).astype(np.float32)
    features[:, :3] += 3 * np.eye(3, dtype=np.float32)[classes]
    found = Ridge(64, 3, 24)
    found.add(features, np.eye(3)[classes], np.ones(24))
    assert found.beats_shuffled(found.fit(cross_entropy).loss, cross_entropy)
