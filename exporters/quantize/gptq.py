"""GPTQ: round the weights of linear layers so that what they compute, rather than the weights, comes nearest.

    minimize  ‖X Wᵀ - X_q Qᵀ‖²   over quantized Q

where X holds what the layer reads in the float model, and X_q what it reads behind layers that are quantized
already. Columns are rounded one after the other, and the columns that are left make up for each one's error:
Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323. To aim at the float model's output rather than at that of the same weights is the idea of Li et
al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv 2504.02692. Here W is
first moved towards the weight that is best for X_q, by as much as holds on records that it was not fitted to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .blockwise import fit_blocks, inverse_of, scale_dtype, to_codes
from .layouts import BlockValues, QuantizedWeight, concatenate

#: Added to the diagonal of a Hessian, as a fraction of its mean (the paper's): directions that the records
#: hardly have must not take over whole weights.
DAMPING = 0.01
#: Rows are rounded independently of one another; so many weights in a few copies are in memory at once.
_WEIGHTS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class InputStatistics:
    """What GPTQ knows of the values that a linear reads: `hessian` X_qᵀ X_q and `shift` (X - X_q)ᵀ X_q,
    float32 `[in_features, in_features]`."""

    hessian: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def empty(cls, in_features: int) -> "InputStatistics":
        """Of no values yet."""
        return cls(torch.zeros(in_features, in_features), torch.zeros(in_features, in_features))

    def add(self, exact: torch.Tensor, quantized: torch.Tensor) -> None:
        """Count more rows of X and X_q, float32 `[…, in_features]` both."""
        rows, quantized_rows = (x.reshape(-1, len(self.hessian)) for x in (exact, quantized))
        self.hessian.addmm_(quantized_rows.T, quantized_rows)
        self.shift.addmm_((rows - quantized_rows).T, quantized_rows)

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        return InputStatistics(self.hessian + other.hessian, self.shift + other.shift)


def gptq(
    weights: Sequence[torch.Tensor],
    halves: tuple[InputStatistics, InputStatistics],
    bits: Sequence[int],
    block_size: int,
) -> list[QuantizedWeight]:
    """Quantize the weights of linears that read the same values.

    Blocks go by their share of the Hessian's diagonal, the largest first, and so do the columns of a block:
    what matters most is rounded while there are many columns left to make up for it. In the result blocks and
    columns are where they were. The scales of a block are chosen when its turn comes.

    Args:
        weights: float32 `[out_features, in_features]` each, of the same `in_features`.
        halves: what they read in one half of the records and in the other; not all zeros.
        bits: 4 or 8, of each weight.
        block_size: weights that share a scale; divides `in_features`.
    """
    inputs = halves[0] + halves[1]
    hessian = _damped(inputs.hessian)
    order = _order(hessian.diagonal(), block_size)
    ordered = hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    importance = ordered.diagonal().float()
    found = []
    for weight, kept_bits in zip(_corrected(weights, inputs, halves), bits, strict=True):
        rows = max(1, _WEIGHTS_AT_A_TIME // weight.shape[1])
        parts = [
            _round(part[:, order].float(), upper, importance, order, kept_bits, block_size)
            for part in weight.split(rows)
        ]
        found.append(concatenate(parts))
    return found


def _corrected(
    weights: Sequence[torch.Tensor],
    inputs: InputStatistics,
    halves: tuple[InputStatistics, InputStatistics],
) -> Sequence[torch.Tensor]:
    """The weights that are to be rounded: moved towards those which are best for X_q. `inputs` is the sum of
    both halves."""
    if not inputs.shift.any():  # nothing is quantized before these
        return weights
    weight = torch.cat(list(weights)).float()
    moved = weight + _holding(weight, *halves) * _correction(weight, inputs)
    parts: Sequence[torch.Tensor] = moved.split([len(one) for one in weights])
    return parts


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    """In float64, for the factorizations."""
    damped = hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return damped


def _correction(weight: torch.Tensor, inputs: InputStatistics) -> torch.Tensor:
    """What is to be added to `weight` `[rows, columns]` so that it makes of X_q what it made of X."""
    factor = torch.linalg.cholesky(_damped(inputs.hessian))
    return torch.cholesky_solve((weight @ inputs.shift).double().T, factor).T.float()


def _holding(weight: torch.Tensor, fitted: InputStatistics, others: InputStatistics) -> float:
    """The fraction, 0 to 1, of the correction that `fitted` gives which is best for `others`.

    Few records give a correction that is mostly chance: then it is near 0.
    """
    if not (fitted.hessian.any() and others.hessian.any()):
        return 0.0
    correction = _correction(weight, fitted)
    wanted = ((weight @ others.shift) * correction).sum()
    effect = ((correction @ others.hessian) * correction).sum()
    return float((wanted / effect).clamp(0, 1)) if effect > 0 else 0.0


def _order(diagonal: torch.Tensor, block_size: int) -> torch.Tensor:
    """The columns in the order they are rounded in, int64 `[in_features]`, block after block."""
    shares = diagonal.reshape(-1, block_size)
    blocks = shares.sum(1).argsort(descending=True)
    within = shares[blocks].argsort(1, descending=True)
    return (blocks[:, None] * block_size + within).flatten()


def _round(
    weight: torch.Tensor,
    upper: torch.Tensor,
    importance: torch.Tensor,
    order: torch.Tensor,
    bits: int,
    block_size: int,
) -> QuantizedWeight:
    """Round `weight` `[rows, columns]`, whose columns are in `order` and which is changed.

    Args:
        upper: the Cholesky factor U of the Hessian's inverse, `Uᵀ U`. Its row j says how the columns after j
            make up for an error of j once those before it are fixed.
        importance: the Hessian's diagonal, float32 `[columns]`, in that order too.
    """
    rows, columns = weight.shape
    dtype = scale_dtype(weight, bits)
    codes = np.empty((rows, columns), np.uint8)
    scales = torch.empty(rows, columns // block_size, dtype=dtype).numpy()
    zero_points = np.empty((rows, columns // block_size), np.uint8)
    for start in range(0, columns, block_size):
        stop = start + block_size
        scale, zero_point = fit_blocks(weight[:, start:stop], bits, dtype, importance[start:stop])
        left = weight[:, start:stop].T.contiguous()  # a column of the weight is a row here
        errors, own = torch.empty_like(left), upper[start:stop, start:stop]
        inverse = inverse_of(scale)
        for column in range(block_size):
            code = to_codes(left[column], inverse, zero_point, bits)
            codes[:, order[start + column]] = code.to(torch.uint8).numpy()
            errors[column] = (left[column] - (code - zero_point) * scale) / own[column, column]
            left[column + 1 :].addr_(own[column, column + 1 :], errors[column], alpha=-1)
        block = int(order[start]) // block_size
        scales[:, block], zero_points[:, block] = scale.numpy(), zero_point.numpy()
        weight[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return QuantizedWeight.of_codes(
        codes, BlockValues(scales), bits, block_size, zero_points=zero_points if bits == 4 else None
    )
