"""The mix on CPUs: all that stands between the product with [A; R] and the one with B, in as few operations as can be.

Between the products of a training step a CPU's caches hold other things, and an operation takes 10 to 50 us, measured
on two cores, whatever its arithmetic. Hence what is written in place, and no intermediate that another one can give.
`mixture.py` has the readable reference.

Axis legend: N tokens, which stand last, since that vectorises; E experts, P rows of the prior, for N / P tokens each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scales(NamedTuple):
    """What softmax and prior are multiplied by, the gate included: the larger of the two, and both over that."""

    larger: float
    token: float
    known: float

    @classmethod
    def of(cls, by_token: float, by_prior: float) -> Scales:
        larger = by_token if by_token > by_prior else by_prior
        return cls(larger, by_token / larger, by_prior / larger) if larger else cls(0.0, 1.0, 1.0)


def mix(h: Tensor, r_a: int, prior: Tensor | None, scales: Scales, *, paired: bool) -> Tensor:
    """What B is applied to, `m = a (by_token * softmax(z) + by_prior * prior)`.

    Args:
        h: (r_a + E, N), the features a and the router's logits z, float32 or float64, contiguous. The softmax takes
            the place of the logits, as [`mix_backward`] wants it.
        r_a: how many rows of `h` are features.
        prior: (P, E), or None.
        scales: by_token and by_prior.
        paired: the layout, "grid" otherwise.

    Returns:
        (r_b, N), in h's dtype.
    """
    p = h[r_a:]
    torch.softmax(p, 0, out=p)
    a, weights = _weights(h, p, prior, scales)
    m = a * weights
    return (m.squeeze(1) if paired else m.sum(0)).mul_(scales.larger)


def mix_backward(
    h: Tensor, r_a: int, prior: Tensor | None, scales: Scales, dm: Tensor, *, paired: bool, needs_prior: bool
) -> tuple[Tensor, float, float, Tensor | None]:
    """Gradients of [`mix`] for `dm` (r_b, N), in h's dtype and contiguous; `h` as `mix` left it.

    Returns:
        d_h: (r_a + E, N), of what `h` was before.
        token: the token router's share in the sum of m * dm.
        known: the prior's.
        d_prior: (P, E); None without a prior, or where it is not needed.
    """
    p = h[r_a:]
    a, weights = _weights(h, p, prior, scales)
    dm = dm * scales.larger
    each = dm.unsqueeze(1) if paired else dm
    d_h = torch.empty_like(h)
    d_z = d_h[r_a:]
    torch.sum(weights * each, 1, out=d_h[:r_a])
    d_weights = (a * each).flatten(0, 1)
    torch._softmax_backward_data(d_weights, p, 0, h.dtype, grad_input=d_z)
    token = scales.token * float(torch.dot(p.view(-1), d_weights.view(-1)))
    if scales.token != 1:
        d_z *= scales.token
    if prior is None:
        return d_h, token, 0.0, None
    d_rows = _by_prompt(d_weights, prior).sum(2).T
    known = scales.known * float((d_rows * prior).sum())
    return d_h, token, known, d_rows * scales.known if needs_prior else None


def _weights(h: Tensor, p: Tensor, prior: Tensor | None, scales: Scales) -> tuple[Tensor, Tensor]:
    """a (r_a, 1, N), and what it is multiplied by but for the larger scale (r_a, E / r_a, N); `p` is h's softmax."""
    rows, tokens = h.shape
    r_a, G = rows - len(p), p
    a = h.as_strided((r_a, 1, tokens), (tokens, tokens, 1))
    if prior is not None:
        if prior.dtype != h.dtype:
            prior = prior.to(h.dtype)
        each, known = _by_prompt(p, prior), prior.T.unsqueeze(2)
        if scales.token == 1:
            G = torch.add(each, known, alpha=scales.known)
        else:  # where the result would have the axes of `known` in memory
            G = torch.add(known, each, alpha=scales.token, out=torch.empty_like(each))
    return a, G.view(r_a, rows // r_a - 1, tokens)


def _by_prompt(values: Tensor, prior: Tensor) -> Tensor:
    """(E, P, N / P), of (E, N)."""
    return values.view(len(values), len(prior), values.shape[1] // max(1, len(prior)))
