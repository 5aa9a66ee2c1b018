"""The fast path of the mixture with gradients: [`rank_one_mixture`] with a backward pass written by hand.

It keeps the layer's input, the product with [A; R] (N, r_a + E) and the mixed features (N, r_b), but nothing of width
D_out. Without a router it keeps `A x` (N, r_a) and the experts' weights (P, E) instead of it. Softmax, weights
and mix are in float32 or wider; the products with A, R and B are in the dtype of the input, or of autocast. Here N is
the number of tokens of all rows, and P the number of the prior's rows, each for N / P tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixture import AUTOCAST, Experts, Settings, keep_strongest
from . import core, cpu, gpu
from .base import SHORT, Base
from .half import Factor

# CPUs without AVX-512 have no products in half precision, and PyTorch's substitutes take up to ten times as long.
SLOW_ON_CPU = SHORT if torch.backends.cpu.get_cpu_capability() == "AVX2" else set()


def add_fused(base: Base, x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """The base layer's output plus the adapter's, (..., D_out); its backward pass refuses `create_graph=True`."""
    device, dtype, shape = x.device.type, x.dtype, (*x.shape[:-1], experts.B.shape[0])
    autocast = torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # CPUs gain nothing by float16, whose range is too small for what lies between the products.
    slow = not gpu.available(x) and (dtype == torch.float16 or dtype in SLOW_ON_CPU)
    if slow:
        dtype = torch.float32
    if prior is not None and prior.dim() == 3:  # (B or 1, T or 1, E)
        prior = prior.expand(*x.shape[:-1], prior.shape[-1]).flatten(0, 1)
    output: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    if base.layer is None or slow:
        # The function gets and returns tokens (N, D_out), and rows are made of them outside: an activation could not
        # change a view in place that the function itself returned.
        output = base.compute()
        output = output.reshape(-1, output.shape[-1])
    else:
        weight, bias = base.layer.weight, base.layer.bias
    if autocast:
        x = x if dtype == torch.float32 else x.to(dtype)
        weight, bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    arguments = (output, weight, bias, x, prior, settings, dtype, *experts)
    # Without gradients there is nothing to keep.
    if torch.is_grad_enabled():
        return without_autocast(device, _Mixture.apply, *arguments).view(shape)
    return without_autocast(device, _Mixture.forward, None, *arguments).view(shape)


def without_autocast(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function while autocast is off; torch.autocast takes four to eight times as long."""
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return function(*arguments)
    # The compiler of torch 2.8 knows autocast as a block only.
    if torch.compiler.is_compiling():
        with torch.autocast(device, enabled=False):
            return function(*arguments)
    torch.set_autocast_enabled(device, False)
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_enabled(device, True)


def stack(experts: Experts) -> Tensor:
    """[A; R] (r_a + E, D_in), or (r_a + Q, D_in) with a reduced router, or A alone without one."""
    lower = experts.router if experts.router_down is None else experts.router_down
    return experts.A if lower is None else torch.cat((experts.A, lower))


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The output (N, D_out), from x (..., D_in) and prior (P, E). The products are made in `dtype`.

        Without a router there are two ways: omega and gate are given, and the prior as it is; or they are None, and
        the experts' weights (P, E) that [`core.fold`] made stand in the prior's place.

        The base layer's part is its output (N, D_out), or is made of its weight (D_out, D_in) and bias (D_out,).
        """
        output, weight, bias, x, prior, settings, dtype, *tensors = arguments
        experts = Experts(*tensors)
        tokens, down, up = x.reshape(-1, x.shape[-1]), stack(experts), experts.B
        # A cast takes time even where it changes nothing.
        if not tokens.dtype == down.dtype == up.dtype == dtype:
            tokens, down, up = tokens.to(dtype), down.to(dtype), up.to(dtype)
        scales = features = h = kept = None
        if experts.router is None:
            if experts.omega is not None:
                scales = cpu.Scales.of(experts, prior, settings)
                prior = core.weigh(prior, experts.A, scales)
            features = tokens @ down.T
            kept = mixed = core.mix(features, prior, settings.layout).to(dtype)
        elif gpu.available(tokens):
            # The kernel's backward pass makes `h` and `mixed` again.
            features = tokens @ down.T
            mixed = gpu.mix(_with_logits(features.T, experts, settings).T, prior, experts, settings)
        else:
            scales, products = cpu.Scales.of(experts, prior, settings), _tokens_last(tokens, down)
            features = None if experts.router_down is None else products.T
            h = _wide(_with_logits(products, experts, settings))
            kept = mixed = cpu.mix(h, len(experts.A), prior, scales, settings).to(dtype).T
        inner = Factor.of(mixed, dtype)
        left, right = inner.factor, inner.matching(up.T)
        if output is None:
            output = F.linear(tokens, weight, bias).addmm_(left, right)
        elif output.dtype == dtype:
            output = torch.addmm(output, left, right)
        else:
            output = output + (left @ right).to(output.dtype)
        if ctx is not None:
            ctx.settings, ctx.dtype, ctx.scales = settings, dtype, scales
            # To stack again costs little, to cast again does not.
            cast = None if dtype == experts.A.dtype else down
            ctx.save_for_backward(weight, x, prior, cast, features, h, kept, *experts._replace(B=up))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "The fast path of T-REX has no second derivative, which create_graph=True asks for. Set "
                "mixture_implementation='reference' in the TRexConfig."
            )
        # The forward chose the dtypes, whatever backward() is called in.
        return without_autocast(grad.device.type, _backward, ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, x, prior, down, features, h, mixed, *tensors = ctx.saved_tensors
    experts, settings, dtype = Experts(*tensors), ctx.settings, ctx.dtype
    _, _, _, needs_x, needs_prior, *_ = ctx.needs_input_grad
    r_a = len(experts.A)
    down, up = stack(experts).to(dtype) if down is None else down, experts.B
    tokens, outgoing = x.reshape(-1, x.shape[-1]).to(dtype), grad.to(dtype)
    d_prior: Tensor | None
    d_omega = d_gate = None
    if experts.router is None:
        d_h, d_prior = core.mix_backward(features, prior, outgoing @ up, settings.layout)
        d_h = d_h.to(dtype)
        if ctx.scales is not None:
            d_prior, d_omega, d_gate = core.weigh_backward(prior, d_prior, ctx.scales, settings)
    elif h is None:
        logits = _with_logits(features.T, experts, settings).T
        du = outgoing @ up
        mixed, d_h, d_omega, d_gate, d_prior = gpu.mix_backward(logits, du, prior, experts, settings, needs_prior)
    else:
        dm = _wide(_tokens_last(outgoing, up.T))
        d_h, d_omega, d_gate, d_prior = cpu.mix_backward(h, r_a, prior, ctx.scales, settings, dm, needs_prior)
        d_h = d_h.T
        # Products in half precision take twice as long if the tokens do not stand first.
        if d_h.dtype != dtype:
            d_h = d_h.to(dtype, memory_format=torch.contiguous_format)
    d_up = None
    if experts.router_down is not None:
        d_logits = d_h[:, r_a:]
        d_up = d_logits.T @ features[:, r_a:].to(d_h.dtype)
        d_h = torch.cat((d_h[:, :r_a], d_logits @ experts.router.to(d_h.dtype)), -1)  # type: ignore[union-attr]
    outer = Factor.of(d_h, dtype)
    d_A, d_lower = outer.summed_with(tokens).tensor_split((r_a,))
    d_router, d_router_down = (d_lower, None) if d_up is None else (d_up, d_lower)
    d_router = None if experts.router is None else d_router
    d_x = None
    if needs_x:
        left, right = outer.factor, outer.matching(down)
        d_x = left @ right if weight is None else (outgoing @ weight).addmm_(left, right)
        d_x = d_x.view(x.shape)
    d_output = grad if weight is None else None
    d_B = Factor.of(mixed, dtype).summed_with(outgoing).T
    d_experts = Experts(d_A, d_B, d_router, d_router_down, d_omega, d_gate)
    # Autograd casts the gradients to the dtypes of what they belong to.
    return d_output, None, None, d_x, d_prior, None, None, *d_experts


def _tokens_last(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x.T` (r, N), of x (N, D) and a few rows (r, D); its strides are those of the faster product."""
    return (x @ weight.T).T if x.dtype in SHORT else weight @ x.T


def _wide(values: Tensor) -> Tensor:
    """The values in float32 or wider; contiguous where they were cast."""
    return values.to(torch.float32, memory_format=torch.contiguous_format) if values.dtype in SHORT else values


def _with_logits(features: Tensor, experts: Experts, settings: Settings) -> Tensor:
    """(r_a + E, N): the features with a reduced router's upper factor applied, and the strongest logits chosen."""
    if experts.router_down is None and settings.top_k is None:
        return features
    a, z = features.tensor_split((len(experts.A),))
    if experts.router_down is not None:
        assert experts.router is not None
        z = experts.router.to(features.dtype) @ z
    if settings.top_k is not None:
        z = keep_strongest(z, settings.top_k, 0)
    return torch.cat((a, z))
