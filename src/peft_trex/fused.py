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
from .mixture import Layout, keep_strongest

SHORT = {torch.bfloat16, torch.float16}
# CPUs without AVX-512 have no products in half precision; PyTorch's substitutes take up to ten times as long
SLOW_ON_CPU = SHORT if torch.backends.cpu.get_cpu_capability() == "AVX2" else set()
FEW = 64  # tokens, up to which calls cost more than arithmetic


class MixSettings(NamedTuple):
    """The mixture's constants, as [`rank_one_mixture`] names them."""

    r_a: int
    token_scale: float
    prior_scale: float = 4.0
    temperature: float = 100.0
    layout: Layout = "grid"
    top_k: int | None = None

    def of_kernels(self) -> dict[str, Any]:
        """What the kernels take: the logits that they get say already which experts are left."""
        return {name: value for name, value in self._asdict().items() if name != "top_k"}


def fusible(x: Tensor, A: Tensor) -> bool:
    """Whether there is a fast path for a layer's input: a plain tensor on a CPU, or where the kernels run."""
    return type(x) is Tensor and (x.is_cpu or (kernels.available(x) and kernels.available(A)))


def add_mixture(
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
) -> Tensor:
    """`result` plus the output of one adapter, as [`rank_one_mixture`] defines it.

    Args:
        result: (..., D_out), what the adapter's output is added to. It is not changed.
        x, A, B, router, router_down, prior, omega_logit, gate_logit: as in [`rank_one_mixture`]; router, omega_logit
            and gate_logit must be there.
        settings: the constants.

    Returns:
        (..., D_out) in the dtype of `result`.

    Raises:
        NotImplementedError: by the backward pass, for `create_graph=True`.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    # not whatever is short: a checkpointed forward, without gradients, must round as its second run does
    if not torch.is_grad_enabled() and device == "cpu" and x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= FEW:
        if not autocast:
            return _decode(result, x, A, B, router, router_down, prior, omega_logit, gate_logit, settings)
        with torch.autocast(device, enabled=False):
            return _decode(result, x, A, B, router, router_down, prior, omega_logit, gate_logit, settings)
    dtype = x.dtype
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype in SLOW_ON_CPU:
        dtype = torch.float32
    if prior is not None and prior.dim() == 3:  # one row for each token
        prior = prior.expand(*x.shape[:-1], prior.shape[-1]).flatten(0, 1)
    arguments = (A, B, router, router_down, prior, omega_logit, gate_logit, settings, dtype)
    # a view that an autograd function returned could not be changed in place, by an activation for instance
    rows = result.reshape(-1, result.shape[-1])
    if not autocast:
        return _run(rows, x, *arguments).view(result.shape)
    with torch.autocast(device, enabled=False):
        return _run(rows, x if dtype == torch.float32 else x.to(dtype), *arguments).view(result.shape)


def _run(*arguments: Any) -> Tensor:
    return _Mixture.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)[0]


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
) -> Tensor:
    """The output for x (B, 1, D_in) with as few calls as can be: on a CPU they are what decoding costs."""
    alone = x.shape[0] == 1  # one row is a vector, and products with it take half as long
    x = x.reshape(-1) if alone else x
    if x.dtype != A.dtype:  # cheaper than a copy of the weights
        x = x.to(A.dtype)
    apply = _apply_to_vector if alone else F.linear
    a, z = apply(x, A), apply(x, router if router_down is None else router_down)
    if router_down is not None:
        z = apply(z, router)
    if A.dtype in SHORT:
        a, z = a.float(), z.float()
    if settings.top_k is not None:
        z = keep_strongest(z, settings.top_k)
    G = torch.softmax(z, -1)
    scale, by_token, by_prior = _shares(_number(omega_logit, settings), prior, settings)
    if prior is not None:
        if not alone:
            prior = prior.view(-1, 1, prior.shape[-1])
        G = torch.add(G, prior, alpha=by_prior) if by_token == 1 else torch.add(prior, G, alpha=by_token)
    if settings.layout == "paired":
        m = (a * G).view(a.shape)
    elif alone:
        m = torch.mv(G.view(settings.r_a, -1).T, a)
    else:
        m = torch.matmul(a.unsqueeze(-2), G.unflatten(-1, (settings.r_a, -1))).squeeze(-2)
    delta = apply(m if m.dtype == A.dtype else m.to(A.dtype), B)
    if result.dtype != A.dtype:
        delta = delta.to(result.dtype)
    return torch.add(result, delta, alpha=scale * _number(gate_logit, settings))


def _apply_to_vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x)


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
    """The output (N, D_out), as `result`, and [A; R] x (N, r_a + E), or (N, r_a + Q) if the router is reduced."""
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    features = _product(tokens, _stack(A, router, router_down, dtype))
    mixed = mix(_with_logits(features, router, router_down, settings), prior, omega_logit, gate_logit, settings)
    up = B.to(dtype).T
    if result.dtype == dtype:  # in one pass
        return torch.addmm(result, mixed, up), features
    return result + (mixed @ up).to(result.dtype), features


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
    outgoing = grad.to(dtype)
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
    """(N, r_a + E): what [A; R] leaves to do is done, a reduced router's upper factor and the choice of experts."""
    if router_down is None and settings.top_k is None:
        return features
    a, z = features.T.tensor_split((settings.r_a,))
    if router_down is not None:
        z = router.to(features.dtype) @ z
    if settings.top_k is not None:
        z = keep_strongest(z, settings.top_k, 0)
    return torch.cat((a, z)).T


def _number(logit: Tensor, settings: MixSettings) -> float:
    """Sigmoid of a one-element logit, as a number: on a CPU that costs less than a tensor."""
    scaled = settings.temperature * float(logit)
    grown = math.exp(-abs(scaled))  # which never overflows
    return 1 / (1 + grown) if scaled > 0 else grown / (1 + grown)


def _shares(omega: float, prior: Tensor | None, settings: MixSettings) -> tuple[float, float, float]:
    """`G = scale * (by_token * softmax + by_prior * prior)`, where the larger of the two shares is one."""
    token, known = omega * settings.token_scale, (1 - omega) * settings.prior_scale
    if prior is None:
        return token, 1.0, 0.0
    return (token, 1.0, known / token) if token > known else (known, token / known, 1.0)


def mix(h: Tensor, prior: Tensor | None, omega_logit: Tensor, gate_logit: Tensor, settings: MixSettings) -> Tensor:
    """What B is applied to, `gate * (a G)`, (N, r_b) in h's dtype.

    Args:
        h: (N, r_a + E), the features a and the router's logits.
        prior: (P, E), or None; N is a multiple of P.
        omega_logit, gate_logit: one element each.
        settings: the constants.
    """
    if kernels.available(h):
        return kernels.mix(h, prior, omega_logit, gate_logit, **settings.of_kernels())
    scale, by_token, by_prior = _shares(_number(omega_logit, settings), prior, settings)
    a, _, G = _weights(h, prior, by_token, by_prior, settings)
    return _contract(a, G, settings).mul_(scale * _number(gate_logit, settings)).to(h.dtype).T


def _weights(
    h: Tensor, prior: Tensor | None, by_token: float, by_prior: float, settings: MixSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """a (r_a, N), softmax (E, N) and G / scale (E, N) in float32 or wider; the tokens stand last."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    columns = h.T
    p = torch.softmax(columns[settings.r_a :], 0, dtype=dtype)
    G = p
    if prior is not None:
        each, known = _by_prior(p, prior), prior.T.to(dtype).unsqueeze(2)
        G = torch.empty_like(p)
        smaller = (each, known, by_prior) if by_token == 1 else (known, each, by_token)
        torch.add(*smaller[:2], alpha=smaller[2], out=_by_prior(G, prior))
    return columns[: settings.r_a].to(dtype), p, G


def _by_prior(values: Tensor, prior: Tensor) -> Tensor:
    """(E, P, N / P), of (E, N)."""
    experts, tokens = values.shape
    return values.view(experts, len(prior), tokens // max(1, len(prior)))


def _by_input(values: Tensor, settings: MixSettings) -> Tensor:
    """(r_a, r_b, N), of (E, N) in the grid layout."""
    experts, tokens = values.shape
    return values.view(settings.r_a, experts // settings.r_a, tokens)


def _contract(a: Tensor, G: Tensor, settings: MixSettings) -> Tensor:
    """a G (r_b, N)."""
    return a * G if settings.layout == "paired" else (a.unsqueeze(1) * _by_input(G, settings)).sum(0)


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
            h, du, prior, omega_logit, gate_logit, needs_prior=needs_prior, **settings.of_kernels()
        )
    omega, gate = _number(omega_logit, settings), _number(gate_logit, settings)
    scale, by_token, by_prior = _shares(omega, prior, settings)
    a, p, G = _weights(h, prior, by_token, by_prior, settings)
    m = _contract(a, G, settings)
    dm = du.T.to(a.dtype) * (scale * gate)  # of m as it is here, without scale and gate
    d_gate = float((dm * m).sum()) * (1 - gate) * settings.temperature
    if settings.layout == "paired":
        d_a, d_G = dm * G, dm * a
    else:
        d_a = (_by_input(G, settings) * dm).sum(1)
        d_G = (a.unsqueeze(1) * dm).view(G.shape)
    d_z = p * d_G
    along = d_z.sum(0)
    d_z.addcmul_(p, along, value=-1)
    if by_token != 1:
        d_z *= by_token
    d_omega, d_prior = settings.token_scale * float(along.sum()), None
    if prior is not None:
        d_rows = _by_prior(d_G, prior).sum(2).T
        d_omega -= settings.prior_scale * float((d_rows * prior).sum())
        d_prior = d_rows * by_prior if needs_prior else None
    # times omega (1 - omega) / scale, in which a factor cancels
    d_omega *= settings.temperature * (
        (1 - omega) / settings.token_scale if by_token == 1 else omega / settings.prior_scale
    )
    logits = a.new_tensor([d_omega, d_gate])
    return m.mul_(scale * gate).to(h.dtype).T, torch.cat((d_a, d_z)).to(h.dtype).T, logits[:1], logits[1:], d_prior
