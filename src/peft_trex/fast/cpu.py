"""The mix on CPUs: all between the product with [A; R] and the one with B, in as few operations as can be.

Between the products of a training step a CPU's caches hold other things, and an operation takes 10 to 50 us, measured
on two cores, whatever its arithmetic. So results are written in place, and as few tensors as possible are made.

Axis legend: N tokens, which stand last, since that vectorises; E experts, P rows of the prior, for N / P tokens each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixture import Experts, Settings, keep_strongest
from .base import SHORT


class Scales(NamedTuple):
    """omega and gate as Python numbers, which cost less than tensors of one element.

    The factors of softmax and prior, gate included, are `larger * token` and `larger * prior`; one of these two is 1.
    Without a router there is no softmax, and `larger` is the prior's factor.
    """

    omega: float
    gate: float
    larger: float
    token: float
    prior: float

    @classmethod
    def of(cls, experts: Experts, prior: Tensor | None, settings: Settings) -> Scales:
        omega = _sigmoid(settings.temperature * float(experts.omega))  # type: ignore[arg-type]
        gate = _sigmoid(settings.temperature * float(experts.gate))  # type: ignore[arg-type]
        token = gate * (omega * settings.token_scale)
        by_prior = 0.0 if prior is None else gate * ((1 - omega) * settings.prior_scale)
        larger = by_prior if experts.router is None else max(token, by_prior)
        return cls(omega, gate, larger, token / larger, by_prior / larger) if larger else cls(omega, gate, 0, 1, 1)


def _sigmoid(z: float) -> float:
    # The exponent is never positive, so that nothing overflows.
    decayed = math.exp(-abs(z))
    return 1 / (1 + decayed) if z > 0 else decayed / (1 + decayed)


def mix(h: Tensor, r_a: int, prior: Tensor | None, scales: Scales, settings: Settings) -> Tensor:
    """The mixed features `m = gate (a G)`, (r_b, N) in h's dtype.

    Args:
        h: (r_a + E, N), the features a and the router's logits z, float32 or float64, contiguous. The softmax takes
            the place of the logits, as [`mix_backward`] wants it.
        r_a: how many rows of `h` are features.
        prior: (P, E), or None.
    """
    p = h[r_a:]
    torch.softmax(p, 0, out=p)
    a, weights = _weights(h, p, prior, scales)
    m = a * weights
    return (m.squeeze(1) if settings.layout == "paired" else m.sum(0)).mul_(scales.larger)


def mix_backward(
    h: Tensor, r_a: int, prior: Tensor | None, scales: Scales, settings: Settings, dm: Tensor, needs_prior: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of [`mix`] for `dm` (r_b, N), in h's dtype and contiguous; `h` as `mix` left it.

    Returns:
        d_h: (r_a + E, N), for `h` as it was before.
        d_omega, d_gate: one element each, for the logits.
        d_prior: (P, E); None without a prior, or where it is not needed.
    """
    p = h[r_a:]
    a, weights = _weights(h, p, prior, scales)
    dm = dm * scales.larger
    dm = dm.unsqueeze(1) if settings.layout == "paired" else dm
    d_h = torch.empty_like(h)
    d_z = d_h[r_a:]
    torch.sum(weights * dm, 1, out=d_h[:r_a])
    d_weights = (a * dm).flatten(0, 1)
    torch._softmax_backward_data(d_weights, p, 0, h.dtype, grad_input=d_z)
    # These are the shares of the router and the prior in the sum of m * dm.
    by_token, by_prior = scales.token * float(torch.dot(p.view(-1), d_weights.view(-1))), 0.0
    if scales.token != 1:
        d_z *= scales.token
    d_prior = None
    if prior is not None:
        d_rows = _by_prompt(d_weights, prior).sum(2).T
        by_prior = scales.prior * float((d_rows * prior).sum())
        d_prior = d_rows * scales.prior if needs_prior else None
    d_omega = settings.temperature * ((1 - scales.omega) * by_token - scales.omega * by_prior)
    d_gate = settings.temperature * (1 - scales.gate) * (by_token + by_prior)
    return d_h, h.new_full((1,), d_omega), h.new_full((1,), d_gate), d_prior


def _weights(h: Tensor, p: Tensor, prior: Tensor | None, scales: Scales) -> tuple[Tensor, Tensor]:
    """a (r_a, 1, N) and its weights (r_a, E / r_a, N), which the larger scale is not part of; `p` is h's softmax."""
    rows, tokens = h.shape
    r_a, G = rows - len(p), p
    a = h.as_strided((r_a, 1, tokens), (tokens, tokens, 1))
    if prior is not None:
        token, by_prompt = _by_prompt(p, prior), prior.to(h.dtype).T.unsqueeze(2)
        if scales.token == 1:
            G = torch.add(token, by_prompt, alpha=scales.prior)
        else:
            # Without `out`, the result would have the strides of the prior.
            G = torch.add(by_prompt, token, alpha=scales.token, out=torch.empty_like(token))
    return a, G.view(r_a, rows // r_a - 1, tokens)


def _by_prompt(values: Tensor, prior: Tensor) -> Tensor:
    """(E, P, N / P), of (E, N)."""
    return values.view(len(values), len(prior), values.shape[1] // max(1, len(prior)))


def decode(output: Tensor, x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """Add the adapter's output for new tokens x (B, 1, D_in) to the base layer's (B, 1, D_out), without gradients.

    Without a router, the prior is the experts' weights themselves. Decoding costs what its calls cost, so this makes
    few: even a cast to the same dtype is left out.
    """
    A, B, router, router_down, *_ = experts
    # The range of float16 is too small for the features and logits of a large input.
    if A.dtype == torch.float16:
        A, B = A.float(), B.float()
        router = None if router is None else router.float()
        router_down = None if router_down is None else router_down.float()
    # A copy of the input is smaller than one of the weights.
    x = x if x.dtype == A.dtype else x.to(A.dtype)
    a = F.linear(x, A)
    a = a.float() if A.dtype in SHORT else a
    if prior is not None:
        prior = prior.view(-1, 1, prior.shape[-1])
    scale = 1.0
    if router is None:
        assert prior is not None
        G = prior.expand(len(a), 1, -1)
    else:
        z = F.linear(x, router if router_down is None else router_down)
        if router_down is not None:
            z = F.linear(z, router)
        if A.dtype in SHORT:
            z = z.float()
        if settings.top_k is not None:
            z = keep_strongest(z, settings.top_k)
        G = torch.softmax(z, -1)
        scales = Scales.of(experts, prior, settings)
        scale = scales.larger
        if prior is not None:
            if scales.token == 1:
                G = torch.add(G, prior, alpha=scales.prior)
            else:
                G = torch.add(prior, G, alpha=scales.token)
    if settings.layout == "paired":
        m = a * G
    else:
        m = torch.matmul(a.unsqueeze(-2), G.view(*a.shape, B.shape[1])).squeeze(-2)
    m = m if m.dtype == A.dtype else m.to(A.dtype)
    # A delta in another dtype is rounded once, when it has been scaled.
    return output.add_(F.linear(m, B), alpha=scale)
