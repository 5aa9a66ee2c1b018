"""Second moments of features, and the least squares `m ~ U z` that they solve.

Axis legend: N tokens, S sets of tokens that are summed apart, r_b the width of m, n the width of z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The share for `ridge`, by the features that a fit starts from: a = A x for "core", the layer's input x for "input".
RIDGE = {"core": 1e-8, "input": 1e-4}


class Moments(NamedTuple):
    """Float64 sums over the tokens of S sets: z z^T (S, n, n), m z^T (S, r_b, n), m m^T (S, r_b, r_b), tokens (S,).

    A single set may come without the axis S.
    """

    zz: Tensor
    mz: Tensor
    mm: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, sets: int, n: int, r_b: int, device: torch.device) -> Moments:
        shapes = ((sets, n, n), (sets, r_b, n), (sets, r_b, r_b), (sets,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, z: Tensor, m: Tensor, sets: Tensor) -> None:
        """Count tokens in: z (N, n), m (N, r_b), and the set (N,) that each token belongs to."""
        self.tokens.index_add_(0, sets, torch.ones_like(sets, dtype=torch.float64))
        for total, left, right in ((self.zz, z, z), (self.mz, m, z), (self.mm, m, m)):
            add_products(total, left, right, sets)

    def of(self, index: int | None = None) -> Moments:
        """The moments of one set, or of all tokens, without the axis S."""
        return Moments(*(total.sum(0) if index is None else total[index] for total in self))

    def solve(self, start: Tensor, pull: Tensor) -> Tensor:
        """The U (r_b, n) that minimises `sum |m - U z|^2 + tr((U - start) pull (U - start)^T)`."""
        return start + torch.linalg.solve(self.zz + pull, self.mz - start @ self.zz, left=False)

    def missed(self, U: Tensor, BB: Tensor) -> float:
        """Sum over the tokens of |B m - B U z|^2, with BB = B^T B (r_b, r_b)."""
        cross = U @ self.mz.T
        return max(0.0, (BB * (self.mm - cross - cross.T + U @ self.zz @ U.T)).sum().item())


def add_products(total: Tensor, left: Tensor, right: Tensor, sets: Tensor) -> None:
    """Add each token's `left right^T` to the sum of its set: total (S, a, b), left (N, a), right (N, b), sets (N,)."""
    # There is room for the products of single tokens only where they are small.
    if left.shape[1] * right.shape[1] <= 1024:
        total.index_add_(0, sets, left.double()[:, :, None] * right.double()[:, None, :])
        return
    # Large products in float64 would take most of the time.
    dtype = torch.promote_types(left.dtype, torch.float32)
    for index in sets.unique().tolist():
        chosen = sets == index
        total[index] += left[chosen].to(dtype).T @ right[chosen].to(dtype)


def ridge(zz: Tensor, share: float) -> Tensor:
    """A multiple of the identity (n, n): `share` of the mean of zz's diagonal, or `share` alone where that is zero.

    As a pull of `Moments.solve`, it keeps the start in the directions that no token took.
    """
    scale = zz.diagonal().mean().item()
    return share * (scale if scale > 0 else 1.0) * torch.eye(len(zz), dtype=zz.dtype, device=zz.device)
