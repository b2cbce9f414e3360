"""A linear head in closed form: ridge regression on features, judged by leaving one record out.

With X the features and Y the targets, both centred, W the records' weights and S = Xᵀ W X = V Λ Vᵀ, the head
is V (Λ + α)⁻¹ Vᵀ Xᵀ W Y; the prediction for a record that was left out is y - (y - ŷ) / (1 - h), where
h = w (1 / Σw + zᵀ (Λ + α)⁻¹ z) with z = Vᵀ x. Source: Golub, Heath and Wahba, "Generalized cross-validation
as a method for choosing a good ridge parameter" (1979); what scikit-learn's `RidgeCV` does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
#: Mean loss of scores `[records, outputs]` for targets of the same shape, by record: `[records]`.
Losses = Callable[[FloatArray, FloatArray], FloatArray]

KEPT_BYTES = 8 * 2**20
"""Features that are kept as they are, to be left out one at a time: all, or a sample where they are more."""
ALPHAS = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 5))
"""Penalties to choose from, relative to the largest of `_System.spread`."""
SCALES = tuple(2.0 ** (exponent / 2) for exponent in range(-2, 21))
"""Factors to choose from that make logits of predictions of 0 and 1."""
_AT_ONCE = 256
SHUFFLES = 19
"""Of targets, to see what they are worth: 1 in 20 is the usual level of a test."""


def features_bytes(width: int, count: int) -> int:
    """What `Ridge` holds while so many records are counted in."""
    kept_bytes = 4 * width * count
    return kept_bytes if kept_bytes <= KEPT_BYTES else KEPT_BYTES + 8 * width**2


@dataclass(frozen=True)
class Fit:
    """A fitted head, and what it says of records that it was not fitted on.

    Attributes:
        weight: float32 `[outputs, width]`.
        bias: float32 `[outputs]`.
        alpha: the penalty.
        scale: what weights and bias were multiplied by after the regression.
        left_out: scores `[kept, outputs]` of the kept records, each by a head that was fitted without it.
        targets: their targets.
        weights: their weights.
        loss: weighted mean loss of `left_out`.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    alpha: float
    scale: float
    left_out: FloatArray
    targets: FloatArray
    weights: FloatArray
    loss: float


class Ridge:
    """Takes features batch by batch and fits a head to them.

    What it holds does not grow with the records: sums of `width`² and `width` x `outputs` float64, and
    `KEPT_BYTES` of features.

    Args:
        width: of the features.
        outputs: of the head.
        count: records to come.
        seed: of the sample that is kept where not all can be.
        origin: of a head without a bias: what targets are measured from, for such a head says 0 of features
            that are 0. None: of one with a bias, which is what both are centred for.
    """

    def __init__(
        self, width: int, outputs: int, count: int, seed: int = 0, origin: float | None = None
    ) -> None:
        self._origin = origin
        self._capacity = max(min(KEPT_BYTES // (4 * width), count), 1)
        self._features = np.zeros((self._capacity, width), np.float32)
        self._targets = np.zeros((self._capacity, outputs))
        self._weights = np.zeros(self._capacity)
        self._generator = np.random.default_rng(seed)
        self._seen = 0
        # Of fewer records than features all are kept, and the sums that matter are of records.
        self._sums = None if count <= self._capacity else _Sums(width, outputs)

    def add(self, features: npt.NDArray[np.float32], targets: FloatArray, weights: FloatArray) -> None:
        """Count records in.

        Args:
            features: float32 `[records, width]`.
            targets: `[records, outputs]`.
            weights: `[records]`.
        """
        if self._sums is not None:
            self._sums.add(features.astype(np.float64), targets, weights)
        for row, target, weight in zip(features, targets, weights, strict=True):
            place = self._seen
            if place >= self._capacity:  # reservoir sampling: all are kept with the same probability
                place = int(self._generator.integers(self._seen + 1))
            self._seen += 1
            if place < self._capacity:
                self._features[place], self._targets[place], self._weights[place] = row, target, weight

    @property
    def kept(self) -> tuple[npt.NDArray[np.float32], FloatArray]:
        """Features `[kept, width]` and targets `[kept, outputs]` of all records, or of a sample of them."""
        count = min(self._seen, self._capacity)
        return self._features[:count], self._targets[:count]

    def fit(
        self,
        losses: Losses,
        scales: Sequence[float] = SCALES,
        offset: float = 0.0,
        least: float = 0.0,
    ) -> Fit:
        """The head with the smallest loss on records that were left out; once, for sums are not kept.

        Args:
            losses: what is to be small.
            scales: factors to choose from.
            offset: is subtracted from a prediction before it is scaled: 0.5 makes logits of probabilities.
            least: no penalty is tried that is smaller than so many times what a record's features have as
                squared norm, in the mean, if `ALPHAS` has a larger one.
        """
        system = self._system()
        tried = self._tried(system, losses, scales, offset, least)
        loss, alpha, scale, left_out = min(tried, key=lambda fit: fit[0])
        coefficients = system.vectors @ (system.projected / (system.values + alpha)[:, None])
        bias = system.target_mean - system.feature_mean @ coefficients
        return Fit(
            weight=np.ascontiguousarray(scale * coefficients.T, np.float32),
            bias=(scale * (bias - offset)).astype(np.float32),
            alpha=alpha,
            scale=scale,
            left_out=scale * (left_out - offset),
            targets=system.targets,
            weights=system.weights,
            loss=loss,
        )

    def beats_shuffled(
        self,
        loss: float,
        losses: Losses,
        scales: Sequence[float] = SCALES,
        offset: float = 0.0,
        least: float = 0.0,
    ) -> bool:
        """Whether a fit is better than what can be had from targets that say nothing: than that of each of
        `SHUFFLES` shuffles of the targets among the records, which at random happens once in `SHUFFLES` + 1.

        All records must have been kept. Source: a permutation test (Fisher, 1935).

        Args:
            loss: that of the fit.
            losses: as for `fit`, as are the others.
        """
        own = self._targets, self._weights
        try:
            for _ in range(SHUFFLES):
                order = self._generator.permutation(self._seen)
                self._targets, self._weights = own[0][order], own[1][order]
                tried = self._tried(self._system(), losses, scales, offset, least)
                if any(other <= loss for other, *_ in tried):
                    return False
        finally:
            self._targets, self._weights = own
        return True

    def _system(self) -> "_System":
        kept = min(self._seen, self._capacity)
        rows, targets = self._features[:kept].astype(np.float64), self._targets[:kept]
        weights = self._weights[:kept]
        if self._sums is not None:
            return self._sums.system(rows, targets, weights, self._origin)
        total, mean, target_mean = _centres(weights.sum(), weights @ rows, weights @ targets, self._origin)
        rows -= mean
        turned = np.sqrt(weights)[:, None] * rows
        if kept < rows.shape[1]:
            values, left = np.linalg.eigh(turned @ turned.T)
            values, left = _positive(values, left)
            vectors = turned.T @ left / np.sqrt(values)
        else:
            values, vectors = _positive(*np.linalg.eigh(turned.T @ turned))
        return _System(values, vectors, mean, target_mean, rows @ vectors, targets, weights, total)

    def _tried(
        self, system: "_System", losses: Losses, scales: Sequence[float], offset: float, least: float
    ) -> Iterator[tuple[float, float, float, FloatArray]]:
        """Of each penalty the smallest loss, the penalty itself, the scale and what was left out."""
        spread = system.spread
        norm = float(spread.sum()) / self._seen
        weights = system.weights / system.weights.sum()
        alphas = [alpha * float(spread[0]) for alpha in ALPHAS]
        for alpha in [alpha for alpha in alphas if alpha >= least * norm] or alphas[-1:]:
            left_out = system.left_out(alpha)
            loss, scale = min(
                (float(weights @ losses(scale * (left_out - offset), system.targets)), scale)
                for scale in scales
            )
            yield loss, alpha, scale, left_out


@dataclass(frozen=True)
class _System:
    """Eigenvalues and -vectors of S, the means, and of the kept records z, targets and weights."""

    values: FloatArray
    vectors: FloatArray
    feature_mean: FloatArray
    target_mean: FloatArray
    rotated: FloatArray
    targets: FloatArray
    weights: FloatArray
    total: float
    whole: FloatArray | None = None

    @property
    def spread(self) -> FloatArray:
        """The eigenvalues, largest first; of a head without a bias all but the largest, which may be that of
        the mean and says nothing of how records differ (SmolLM2's is ten times the next)."""
        ordered = np.sort(self.values)[::-1]
        if math.isinf(self.total) and len(ordered) > 1:
            return ordered[1:]
        return ordered if len(ordered) else np.full(1, 1e-30)

    @property
    def projected(self) -> FloatArray:
        """Vᵀ Xᵀ W Y."""
        if self.whole is not None:
            return self.whole
        found: FloatArray = self.rotated.T @ (self.weights[:, None] * (self.targets - self.target_mean))
        return found

    def left_out(self, penalty: float) -> FloatArray:
        """Predictions for the kept records, each without itself."""
        shrunk = 1 / (self.values + penalty)
        predicted = self.rotated @ (shrunk[:, None] * self.projected) + self.target_mean
        leverage = self.weights * (1 / self.total + (self.rotated**2) @ shrunk)
        residual = self.targets - predicted
        found: FloatArray = self.targets - residual / np.maximum(1 - leverage, 1e-9)[:, None]
        return found


class _Sums:
    """Weighted sums of features and targets, float64; features wait to be multiplied many at a time."""

    def __init__(self, width: int, outputs: int) -> None:
        self._total = 0.0
        self._features, self._targets = np.zeros(width), np.zeros(outputs)
        self._squares, self._products = np.zeros((width, width)), np.zeros((width, outputs))
        self._waiting: list[tuple[FloatArray, FloatArray]] = []

    def add(self, features: FloatArray, targets: FloatArray, weights: FloatArray) -> None:
        weighted = features * weights[:, None]
        self._total += weights.sum()
        self._features += weighted.sum(0)
        self._targets += weights @ targets
        self._products += weighted.T @ targets
        self._waiting.append((weighted, features))
        if sum(len(rows) for rows, _ in self._waiting) >= _AT_ONCE:
            self._multiply()

    def _multiply(self) -> None:
        if self._waiting:
            weighted, features = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            for start in range(0, len(self._squares), _AT_ONCE):
                self._squares[start : start + _AT_ONCE] += weighted[:, start : start + _AT_ONCE].T @ features

    def system(
        self, rows: FloatArray, targets: FloatArray, weights: FloatArray, origin: float | None
    ) -> _System:
        """The system of all that was added, which is gone then."""
        self._multiply()
        total, mean, target_mean = _centres(self._total, self._features, self._targets, origin)
        if origin is None:
            for start in range(0, len(mean), _AT_ONCE):
                self._squares[start : start + _AT_ONCE] -= self._total * np.outer(
                    mean[start : start + _AT_ONCE], mean
                )
        values, vectors = _positive(*np.linalg.eigh(self._squares))
        del self._squares
        whole = vectors.T @ (self._products - np.outer(self._features, target_mean))
        rows -= mean
        return _System(values, vectors, mean, target_mean, rows @ vectors, targets, weights, total, whole)


def _centres(
    total: float, features: FloatArray, targets: FloatArray, origin: float | None
) -> tuple[float, FloatArray, FloatArray]:
    """The weight that the means are made of, and the means, from weighted sums; those of a head without a
    bias are given, which is as if no end of records had told them."""
    if origin is None:
        return total, features / total, targets / total
    return math.inf, np.zeros_like(features), np.full_like(targets, origin)


def _positive(values: FloatArray, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Without what rounding makes of eigenvalues that are 0."""
    kept = values > 1e-10 * values.max(initial=1e-30)
    return values[kept], vectors[:, kept]
