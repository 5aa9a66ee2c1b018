"""Factors of products in float16, which ends at 65504, while token_scale times a feature does not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 2.0**15
LARGEST = torch.finfo(torch.float16).max


class Factor(NamedTuple):
    """Values (N, r) as a factor of products with tensors in `dtype`.

    In float16, what lies beyond LIMIT stands in r more columns, divided by powers of two. So a token that needs them
    changes nothing for the others, and nothing waits for a GPU to say whether there is one.
    """

    factor: Tensor  # (N, r), or (N, 2 r) in float16
    scale: Tensor | None  # (r, 1), the powers of two

    @classmethod
    def of(cls, values: Tensor, dtype: torch.dtype) -> Factor:
        """The values, which may be in float32 beside products in float16."""
        if values.dtype == dtype or not len(values):
            return cls(values.to(dtype), None)
        near = values.clamp(-LIMIT, LIMIT)
        beyond = values - near
        # A token that is not finite keeps that to itself.
        peak = beyond.abs().nan_to_num(0, 0).amax(0)
        scale = (peak / LIMIT).log2().ceil().exp2().clamp(min=1)
        return cls(torch.cat((near, beyond / scale), 1).to(dtype), scale[:, None])

    def matching(self, other: Tensor) -> Tensor:
        """What `factor` is multiplied by for `values @ other`, of (r, D) in the products' dtype."""
        if self.scale is None:
            return other
        scaled = (other.float() * self.scale).clamp(-LARGEST, LARGEST)
        return torch.cat((other, scaled.to(other.dtype)))

    def summed_with(self, other: Tensor) -> Tensor:
        """The sum over the tokens `values.T @ other` (r, D), of (N, D)."""
        product = self.factor.T @ other
        if self.scale is None:
            return product
        near, beyond = product.float().chunk(2)
        return near.add_(beyond * self.scale)
