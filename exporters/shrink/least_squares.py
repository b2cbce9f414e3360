"""Which channels of a linear's input to remove, and how the weights of the others make up for them.

    minimize  ‖X Wᵀ - X_S W_Sᵀ‖² + λ ‖W - [W_S 0]‖²   over S, `kept` of the columns, and W_S

Given S this is a system of linear equations in the Hessian H = XᵀX + λ:  W_S = W H[:, S] H[S, S]⁻¹. S is
chosen by removing one column after the other, the one of which least is lost when all others make up for it,
‖w_j‖² (1 / [H⁻¹]_jj - λ): Hassibi and Stork, "Optimal Brain Surgeon", 1993, layer by layer as in Frantar and
Alistarh, "Optimal Brain Compression", arXiv 2208.11580, and of whole structures as in Kurtic et al., "ZipLM",
arXiv 2302.04089.
"""

from dataclasses import dataclass

import torch

#: λ, as a fraction of the mean of the diagonal of XᵀX: directions that the records hardly have must not take
#: over whole weights.
DAMPING = 0.01
#: Columns that are removed before those that are left are put side by side again.
_AT_A_TIME = 64


@dataclass
class InputMoments:
    """What is known of `rows` rows of values X that a linear reads: `products` XᵀX, float32 `[in_features,
    in_features]`, and `sums`, float64 `[in_features]`."""

    products: torch.Tensor
    sums: torch.Tensor
    rows: int = 0

    @classmethod
    def empty(cls, in_features: int) -> "InputMoments":
        """Of no values yet."""
        return cls(torch.zeros(in_features, in_features), torch.zeros(in_features, dtype=torch.float64))

    def add(self, values: torch.Tensor) -> None:
        """Count more rows, float32 `[…, in_features]`."""
        values = values.reshape(-1, len(self.sums))
        self.products.addmm_(values.T, values)
        self.sums += values.sum(0, dtype=torch.float64)
        self.rows += len(values)


@dataclass(frozen=True)
class Narrowed:
    """A linear that reads fewer channels.

    Attributes:
        kept: those that it reads, int64, ascending.
        weight: float32 `[out_features, kept]`.
        bias: float32 `[out_features]`; None where it had none.
        error: of the root of the mean square of what the linear made of X (beside its bias), the fraction
            that has changed.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    error: float


def narrowed(weight: torch.Tensor, bias: torch.Tensor | None, inputs: InputMoments, kept: int) -> Narrowed:
    """Leave `kept` of the columns of a linear's weight.

    With a bias, what the columns that go make on average moves there, and only what varies is left to the
    other columns.

    Args:
        weight: float32 `[out_features, in_features]`.
        bias: float32 `[out_features]`, or None.
        inputs: what it reads; not all zeros.
        kept: fewer than `in_features`.
    """
    products, mean = inputs.products.double(), inputs.sums / max(1, inputs.rows)
    if bias is not None:
        products -= inputs.rows * torch.outer(mean, mean)
    hessian = products.clone()
    damping = DAMPING * float(products.diagonal().mean())
    hessian.diagonal().add_(damping)
    chosen = choose(weight, hessian, damping, kept)
    exact = weight.double()
    factor = torch.linalg.cholesky(hessian[chosen][:, chosen])
    found = torch.cholesky_solve(hessian[chosen] @ exact.T, factor).T
    change = exact.clone()
    change[:, chosen] -= found
    moved = None if bias is None else (bias.double() + change @ mean).float()
    lost, made = (float(((one @ products) * one).sum()) for one in (change, exact))
    error = (max(lost, 0.0) / made) ** 0.5 if made > 0 else 0.0
    return Narrowed(chosen, found.float(), moved, error)


def choose(weight: torch.Tensor, hessian: torch.Tensor, damping: float, kept: int) -> torch.Tensor:
    """The columns that are to be left, int64 `[kept]`, ascending.

    Args:
        weight: `[out_features, in_features]`.
        hessian: positive definite, float64 `[in_features, in_features]`.
        damping: what its diagonal has of λ, which is no loss: a column that is always 0 has none.
        kept: how many.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).float()
    left, weight = torch.arange(len(hessian)), weight.float().clone()
    while len(left) > kept:
        gone = torch.zeros(len(left), dtype=torch.bool)
        for _ in range(min(len(left) - kept, _AT_A_TIME)):
            varies = (1 / inverse.diagonal() - damping).clamp_(min=0)
            losses = weight.square().sum(0) * varies
            column = int(losses.masked_fill(gone, torch.inf).argmin())
            gone[column] = True
            shares = inverse[column] / inverse[column, column]
            weight.addr_(weight[:, column].clone(), shares, alpha=-1)
            inverse.addr_(inverse[:, column].clone(), shares, alpha=-1)
            inverse[column, column] = 1  # it is out: any number but 0
        left, weight = left[~gone], weight[:, ~gone].contiguous()
        inverse = inverse[~gone][:, ~gone].contiguous()
    return left
