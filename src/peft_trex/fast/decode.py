"""One new token of a few rows without gradients: on a CPU, decoding costs what its calls cost, so this makes few."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixture import Experts, Settings, keep_strongest
from .shares import Shares


def decode(output: Tensor, x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """Add the adapter's output for x (B, 1, D_in) to the base layer's `output` (B, 1, D_out), in place."""
    A, B, router, router_down, *_ = experts
    assert router is not None
    # One row is a vector, and products with it take half as long.
    alone = x.shape[0] == 1
    multiply = _multiply_vector if alone else F.linear
    x = x.view(-1) if alone else x
    # A copy of the input is smaller than one of the weights.
    x = x if x.dtype == A.dtype else x.to(A.dtype)
    a, z = multiply(x, A), multiply(x, router if router_down is None else router_down)
    if router_down is not None:
        z = multiply(z, router)
    if A.dtype in (torch.bfloat16, torch.float16):
        a, z = a.float(), z.float()
    if settings.top_k is not None:
        z = keep_strongest(z, settings.top_k)
    G = torch.softmax(z, -1)
    scales = Shares.of(experts, settings).scales(prior, settings)
    if prior is not None:
        if not alone:
            prior = prior.view(-1, 1, prior.shape[-1])
        if scales.token == 1:
            G = torch.add(G, prior, alpha=scales.prior)
        else:
            G = torch.add(prior, G, alpha=scales.token)
    r_a, r_b = A.shape[0], B.shape[1]
    if settings.layout == "paired":
        m = (a * G).view(a.shape)
    elif alone:
        m = torch.mv(G.as_strided((r_b, r_a), (1, r_b)), a)
    else:
        m = torch.matmul(a.unsqueeze(-2), G.view(*a.shape, r_b)).squeeze(-2)
    m = m if m.dtype == A.dtype else m.to(A.dtype)
    if alone and output.dtype == A.dtype:
        output.view(-1).addmv_(B, m, alpha=scales.larger)
        return output
    delta = multiply(m, B)
    return output.add_(delta if delta.dtype == output.dtype else delta.to(output.dtype), alpha=scales.larger)


def _multiply_vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x)
