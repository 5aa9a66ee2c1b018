"""The fast path of the mixture: what [`rank_one_mixture`] computes, with a backward pass written by hand.

It keeps the layer's input and what [A; R] makes of it, (N, r_a + E), and nothing of width D_out. Softmax, weights and
mix are in float32 or wider, and are computed again in the backward pass; the products with A, R and B are in the dtype
of the input, or of autocast. `mixture.py` is the ground truth, and explains the axes; here N is the number of tokens
of all rows, and P that of the prior's rows, each of which holds for N / P tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .mixture import Layout

SHORT = {torch.bfloat16, torch.float16}
# CPUs without AVX-512 have no products in half precision; PyTorch's substitutes take up to ten times as long
SLOW_ON_CPU = SHORT if torch.backends.cpu.get_cpu_capability() == "AVX2" else set()
FEW_TOKENS = 64  # up to here calls cost more than arithmetic


class MixSettings(NamedTuple):
    """The mixture's constants, as [`rank_one_mixture`] names them."""

    r_a: int
    token_scale: float
    prior_scale: float = 4.0
    temperature: float = 100.0
    layout: Layout = "grid"


def add_mixture(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    prior: Tensor | None,
    omega_logit: Tensor,
    gate_logit: Tensor,
    *,
    router_down: Tensor | None = None,
    token_scale: float,
    prior_scale: float = 4.0,
    temperature: float = 100.0,
    layout: Layout = "grid",
) -> Tensor:
    """`result` plus the output of one adapter, as [`rank_one_mixture`] defines it.

    Args:
        result: (..., D_out), what the adapter's output is added to. It is not changed.
        x, A, B, router, prior, omega_logit, gate_logit, router_down, token_scale, prior_scale, temperature, layout:
            as in [`rank_one_mixture`]; router, omega_logit and gate_logit must be there.

    Returns:
        (..., D_out) in the dtype of `result`.

    Raises:
        ValueError: for a prior that does not fit `x`.
        NotImplementedError: by the backward pass, for `create_graph=True`.
    """
    dtype = x.dtype
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if x.device.type == "cpu" and dtype in SLOW_ON_CPU:
        dtype = torch.float32
    settings = MixSettings(A.shape[0], token_scale, prior_scale, temperature, layout)
    arguments = (A, B, router, router_down, prior, omega_logit, gate_logit, settings, dtype)
    if not autocast:
        return _add(result, x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return _add(result, x if dtype == torch.float32 else x.to(dtype), *arguments)


def _add(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    router_down: Tensor | None,
    prior: Tensor | None,
    *rest: Any,
) -> Tensor:
    grad = torch.is_grad_enabled()
    # not whatever is short: a checkpointed forward, without gradients, must round as its second run does
    one_each = x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= FEW_TOKENS
    if one_each and not grad and x.device.type == "cpu" and type(x) is Tensor:
        return _decode(result, x, A, B, router, router_down, prior, *rest)
    if prior is not None and prior.dim() == 3:  # one row for each token
        prior = prior.expand(*x.shape[:-1], prior.shape[-1]).flatten(0, 1)
    arguments = (result, x, A, B, router, router_down, prior, *rest)
    return _Mixture.apply(*arguments) if grad else _forward(*arguments)[0]


def _decode(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    router_down: Tensor | None,
    prior: Tensor | None,
    omega_logit: Tensor,
    gate_logit: Tensor,
    settings: MixSettings,
    dtype: torch.dtype,
) -> Tensor:
    """The output for x (B, 1, D_in) with as few calls as can be: on a CPU they are what decoding costs."""
    if x.dtype != A.dtype:  # cheaper than a copy of the weights
        x = x.to(A.dtype)
    a, z = F.linear(x, A), F.linear(x, router if router_down is None else router_down)
    if router_down is not None:
        z = F.linear(z, router)
    if A.dtype in SHORT:
        a, z = a.float(), z.float()
    G = torch.softmax(z, -1)
    omega = _number(omega_logit, settings)
    scale, known = omega * settings.token_scale, (1 - omega) * settings.prior_scale
    if prior is not None:  # the larger part counts once, the other one as its share: one call
        if prior.dim() == 2 and prior.shape[0] > 1:
            prior = prior.unsqueeze(1)
        G = torch.add(G, prior, alpha=known / scale) if scale > known else torch.add(prior, G, alpha=scale / known)
        scale = max(scale, known)
    if settings.layout == "paired":
        m = a * G
    elif len(x) == 1:
        m = torch.matmul(a, G.view(settings.r_a, -1))
    else:
        m = torch.matmul(a.unsqueeze(-2), G.unflatten(-1, (settings.r_a, -1))).squeeze(-2)
    delta = F.linear(m if m.dtype == A.dtype else m.to(A.dtype), B)
    if result.dtype != A.dtype:
        delta = delta.to(result.dtype)
    return torch.add(result, delta, alpha=scale * _number(gate_logit, settings))


def _forward(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    router_down: Tensor | None,
    prior: Tensor | None,
    omega_logit: Tensor,
    gate_logit: Tensor,
    settings: MixSettings,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output, and what A and the router make of x: (N, r_a + E), or (N, r_a + Q) if the router is reduced."""
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    features = _product(tokens, _stack(A, router, router_down, dtype))
    mixed = mix(_with_logits(features, router, router_down, settings), prior, omega_logit, gate_logit, settings)
    up = B.to(dtype).T
    if result.dtype == dtype:  # in one pass over (N, D_out)
        output = torch.addmm(result.reshape(-1, result.shape[-1]), mixed, up)
        return output.view(result.shape), features
    return result + (mixed @ up).view(result.shape).to(result.dtype), features


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, *rest: Any) -> Tensor:
        output, features = _forward(result, x, *rest)
        *tensors, ctx.settings, ctx.dtype = rest
        ctx.save_for_backward(x, features, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "The fast path of T-REX has no second derivative, which create_graph=True asks for. Set "
                "mixture_implementation='reference' in the TRexConfig."
            )
        device = grad.device.type
        if torch.is_autocast_enabled(device):  # the dtypes are settled, whatever backward() is called in
            with torch.autocast(device, enabled=False):
                return _backward(ctx, grad)
        return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, features, A, B, router, router_down, prior, omega_logit, gate_logit = ctx.saved_tensors
    settings, dtype = ctx.settings, ctx.dtype
    r_a = settings.r_a
    needs_x, needs_prior = ctx.needs_input_grad[1], ctx.needs_input_grad[6]
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    outgoing = grad.reshape(-1, grad.shape[-1]).to(dtype)
    h = _with_logits(features, router, router_down, settings)
    d_mixed = _product(outgoing, B.to(dtype).T)
    mixed, d_h, d_omega, d_gate, d_prior = mix_backward(
        h, d_mixed, prior, omega_logit, gate_logit, settings, needs_prior
    )
    d_up = None
    if router_down is not None:
        d_logits = d_h[:, r_a:]
        d_up = d_logits.T @ features[:, r_a:]
        d_h = torch.cat((d_h[:, :r_a], d_logits @ router.to(dtype)), -1)
    d_A, d_lower = (d_h.T @ tokens).tensor_split((r_a,))
    return (  # autograd takes care of the dtypes
        grad,
        (d_h @ _stack(A, router, router_down, dtype)).view(x.shape) if needs_x else None,
        d_A,
        (mixed.T @ outgoing).T,
        d_lower if d_up is None else d_up,
        None if d_up is None else d_lower,
        d_prior,
        d_omega,
        d_gate,
        None,
        None,
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, (N, r), of x (N, D) and a few rows (r, D)."""
    if x.device.type == "cpu":  # this way round it takes down to a fifth of the time, and the mix vectorises
        return (weight @ x.T).T
    return x @ weight.T


def _stack(A: Tensor, router: Tensor, router_down: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[A; R], (r_a + E, D_in), or (r_a + Q, D_in)."""
    return torch.cat((A, router if router_down is None else router_down)).to(dtype)


def _with_logits(features: Tensor, router: Tensor, router_down: Tensor | None, settings: MixSettings) -> Tensor:
    """(N, r_a + E): a reduced router's upper factor is still to be applied."""
    if router_down is None:
        return features
    a, reduced = features[:, : settings.r_a], features[:, settings.r_a :]
    return torch.cat((a, reduced @ router.to(features.dtype).T), -1)


def _sigmoid(logit: Tensor, settings: MixSettings) -> Any:
    """Of a one-element logit: a number where that costs no waiting for the device, a tensor (1,) elsewhere."""
    if logit.device.type == "cpu" and type(logit.data) is Tensor:
        return _number(logit, settings)
    return torch.sigmoid(settings.temperature * logit.float())


def _number(logit: Tensor, settings: MixSettings) -> float:
    scaled = settings.temperature * float(logit)
    return 1 / (1 + math.exp(-scaled)) if scaled > 0 else 1 - 1 / (1 + math.exp(scaled))


def mix(h: Tensor, prior: Tensor | None, omega_logit: Tensor, gate_logit: Tensor, settings: MixSettings) -> Tensor:
    """What B is applied to, `gate * (a G)`, (N, r_b) in h's dtype.

    Args:
        h: (N, r_a + E), the features a and the router's logits.
        prior: (P, E), or None; N is a multiple of P.
        omega_logit, gate_logit: one element each.
        settings: the constants.
    """
    if kernels.available(h):
        return kernels.mix(h, prior, omega_logit, gate_logit, **settings._asdict())
    a, _, G, _, gate = _weights(h, prior, omega_logit, gate_logit, settings)
    return (_contract(a, G, settings) * gate).to(h.dtype).T


def _weights(
    h: Tensor, prior: Tensor | None, omega_logit: Tensor, gate_logit: Tensor, settings: MixSettings
) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """a (r_a, N), softmax (E, N) and G (E, N) in float32 or wider, omega and gate; the tokens stand last."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    omega, gate = _sigmoid(omega_logit, settings), _sigmoid(gate_logit, settings)
    columns = h.T
    p = torch.softmax(columns[settings.r_a :], 0, dtype=dtype)
    G = p * (omega * settings.token_scale)
    if prior is not None:
        known = prior.T.to(dtype) * ((1 - omega) * settings.prior_scale)
        G.unflatten(1, (known.shape[1], -1)).add_(known.unsqueeze(2))
    return columns[: settings.r_a].to(dtype), p, G, omega, gate


def _contract(a: Tensor, G: Tensor, settings: MixSettings) -> Tensor:
    """m (r_b, N)."""
    if settings.layout == "paired":
        return a * G
    return (a.unsqueeze(1) * G.unflatten(0, (settings.r_a, -1))).sum(0)


def mix_backward(
    h: Tensor,
    du: Tensor,
    prior: Tensor | None,
    omega_logit: Tensor,
    gate_logit: Tensor,
    settings: MixSettings,
    needs_prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """[`mix`] again, and the gradients of its inputs for du (N, r_b): of h, of both logits, of the prior."""
    if kernels.available(h):
        return kernels.mix_backward(
            h, du, prior, omega_logit, gate_logit, needs_prior=needs_prior, **settings._asdict()
        )
    a, p, G, omega, gate = _weights(h, prior, omega_logit, gate_logit, settings)
    m, du = _contract(a, G, settings), du.T.to(a.dtype)
    d_gate = (du * m).sum() * (gate * (1 - gate) * settings.temperature)
    dm = du * gate
    if settings.layout == "paired":
        d_a, d_G = dm * G, dm * a
    else:
        d_a = (G.unflatten(0, (settings.r_a, -1)) * dm).sum(1)
        d_G = (a.unsqueeze(1) * dm).flatten(0, 1)
    p_d_G = p * d_G
    along = p_d_G.sum(0)
    d_z = torch.addcmul(p_d_G, p, along, value=-1) * (omega * settings.token_scale)
    d_omega, d_prior = along.sum() * settings.token_scale, None
    if prior is not None:
        d_rows = d_G.unflatten(1, (prior.shape[0], -1)).sum(2).T * settings.prior_scale
        d_omega = d_omega - (d_rows * prior).sum()
        d_prior = d_rows * (1 - omega) if needs_prior else None
    d_omega = d_omega * (omega * (1 - omega) * settings.temperature)
    d_h = torch.cat((d_a, d_z)).to(h.dtype).T
    return (m * gate).to(h.dtype).T, d_h, d_omega.reshape(1), d_gate.reshape(1), d_prior
