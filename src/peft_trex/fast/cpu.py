"""The mix on CPUs: all between the product with [A; R] and the one with B, in as few operations as can be.

Between the products of a training step a CPU's caches hold other things, and an operation takes 10 to 50 us, measured
on two cores, whatever its arithmetic. So results are written in place, and as few tensors as possible are made.

Axis legend: N tokens, which stand last, since that vectorises; E experts, P rows of the prior, for N / P tokens each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shares import Scales


def mix(h: Tensor, r_a: int, prior: Tensor | None, scales: Scales, paired: bool) -> Tensor:
    """The mixed features `m = a (by_token * softmax(z) + by_prior * prior)`, (r_b, N) in h's dtype.

    Args:
        h: (r_a + E, N), the features a and the router's logits z, float32 or float64, contiguous. The softmax takes
            the place of the logits, as [`mix_backward`] wants it.
        r_a: how many rows of `h` are features.
        prior: (P, E), or None.
        scales: by_token and by_prior.
        paired: whether the layout is "paired" and not "grid".
    """
    p = h[r_a:]
    torch.softmax(p, 0, out=p)
    a, weights = _weights(h, p, prior, scales)
    m = a * weights
    return (m.squeeze(1) if paired else m.sum(0)).mul_(scales.larger)


def mix_backward(
    h: Tensor, r_a: int, prior: Tensor | None, scales: Scales, dm: Tensor, paired: bool, needs_prior: bool
) -> tuple[Tensor, Tensor | None, float, float]:
    """Gradients of [`mix`] for `dm` (r_b, N), in h's dtype and contiguous; `h` as `mix` left it.

    Returns:
        d_h: (r_a + E, N), for `h` as it was before.
        d_prior: (P, E); None without a prior, or where it is not needed.
        by_token: the router's share in the sum of m * dm.
        by_prior: the prior's share in it.
    """
    p = h[r_a:]
    a, weights = _weights(h, p, prior, scales)
    dm = dm * scales.larger
    dm = dm.unsqueeze(1) if paired else dm
    d_h = torch.empty_like(h)
    d_z = d_h[r_a:]
    torch.sum(weights * dm, 1, out=d_h[:r_a])
    d_weights = (a * dm).flatten(0, 1)
    torch._softmax_backward_data(d_weights, p, 0, h.dtype, grad_input=d_z)
    by_token = scales.token * float(torch.dot(p.view(-1), d_weights.view(-1)))
    if scales.token != 1:
        d_z *= scales.token
    if prior is None:
        return d_h, None, by_token, 0.0
    d_rows = _by_prompt(d_weights, prior).sum(2).T
    by_prior = scales.prior * float((d_rows * prior).sum())
    return d_h, d_rows * scales.prior if needs_prior else None, by_token, by_prior


def _weights(h: Tensor, p: Tensor, prior: Tensor | None, scales: Scales) -> tuple[Tensor, Tensor]:
    """a (r_a, 1, N) and its weights (r_a, E / r_a, N), which the larger scale is not part of; `p` is h's softmax."""
    rows, tokens = h.shape
    r_a, G = rows - len(p), p
    a = h.as_strided((r_a, 1, tokens), (tokens, tokens, 1))
    if prior is not None:
        if prior.dtype != h.dtype:
            prior = prior.to(h.dtype)
        token, by_prompt = _by_prompt(p, prior), prior.T.unsqueeze(2)
        if scales.token == 1:
            G = torch.add(token, by_prompt, alpha=scales.prior)
        else:
            # Without `out`, the result would have the strides of the prior.
            G = torch.add(by_prompt, token, alpha=scales.token, out=torch.empty_like(token))
    return a, G.view(r_a, rows // r_a - 1, tokens)


def _by_prompt(values: Tensor, prior: Tensor) -> Tensor:
    """(E, P, N / P), of (E, N)."""
    return values.view(len(values), len(prior), values.shape[1] // max(1, len(prior)))
