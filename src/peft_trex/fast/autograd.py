"""The fast path of the mixture with gradients: [`rank_one_mixture`] with a backward pass written by hand.

It keeps the layer's input, the product with [A; R] (N, r_a + E) and the mixed features (N, r_b), but nothing of width
D_out. Softmax, weights and mix are in float32 or wider; the products with A, R and B are in the dtype of the input, or
of autocast. Here N is the number of tokens of all rows, and P the number of the prior's rows, each for N / P tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mixture import Experts, Settings, keep_strongest
from . import cpu, gpu
from .base import Base
from .shares import Shares

SHORT = {torch.bfloat16, torch.float16}
# CPUs without AVX-512 have no products in half precision, and PyTorch's substitutes take up to ten times as long.
SLOW_ON_CPU = SHORT if torch.backends.cpu.get_cpu_capability() == "AVX2" else set()
WIDE = {torch.float32, torch.float64}


class Operands(NamedTuple):
    """The arguments of the autograd function, or their gradients, in its order.

    The base layer's part is its `output`, or else its `weight` and `bias`; the products are made in `dtype`.
    """

    output: Any = None  # (N, D_out)
    weight: Any = None  # (D_out, D_in)
    bias: Any = None  # (D_out,)
    x: Any = None  # (..., D_in)
    A: Any = None
    B: Any = None
    router: Any = None
    router_down: Any = None
    omega: Any = None
    gate: Any = None
    prior: Any = None  # (P, E)
    settings: Any = None
    dtype: Any = None


class Saved(NamedTuple):
    """The tensors that the backward pass needs, in the order in which autograd keeps them.

    `down` is [A; R] where a cast made it, since stacking again costs little. `h` holds the features and the softmax;
    where a kernel makes it and `mixed` again, both are None and the features are kept instead.
    """

    weight: Tensor | None
    x: Tensor
    A: Any
    B: Any  # (D_out, r_b), in the dtype of the products
    router: Any
    router_down: Any
    omega: Any
    gate: Any
    prior: Tensor | None
    down: Tensor | None  # (r_a + E, D_in), or (r_a + Q, D_in)
    features: Any  # (N, r_a + E), or (N, r_a + Q)
    h: Any  # (r_a + E, N)
    mixed: Any  # (N, r_b)


def add_fused(base: Base, x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """The base layer's output plus the adapter's, (..., D_out); its backward pass refuses `create_graph=True`."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = x.dtype
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    slow = device == "cpu" and dtype in SLOW_ON_CPU
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
    shape = (*x.shape[:-1], experts.B.shape[0])
    if not autocast:
        return _run(output, weight, bias, x, *experts, prior, settings, dtype).view(shape)
    x = x if dtype == torch.float32 else x.to(dtype)
    weight, bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    return without_autocast(device, _run, output, weight, bias, x, *experts, prior, settings, dtype).view(shape)


def without_autocast(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function while autocast, which is on, is off; torch.autocast takes four to eight times as long."""
    torch.set_autocast_enabled(device, False)
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_enabled(device, True)


def stack(experts: Experts) -> Tensor:
    """[A; R] (r_a + E, D_in), or (r_a + Q, D_in) with a reduced router."""
    lower = experts.router if experts.router_down is None else experts.router_down
    assert lower is not None
    return torch.cat((experts.A, lower))


def _run(*operands: Any) -> Tensor:
    return _Mixture.apply(*operands) if torch.is_grad_enabled() else _forward(Operands(*operands))[0]


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        operands = Operands(*arguments)
        output, saved, ctx.shares = _forward(operands)
        ctx.settings, ctx.dtype = operands.settings, operands.dtype
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Operands:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "The fast path of T-REX has no second derivative, which create_graph=True asks for. Set "
                "mixture_implementation='reference' in the TRexConfig."
            )
        device = grad.device.type
        # The forward chose the dtypes, whatever backward() is called in.
        if torch.is_autocast_enabled(device):
            return without_autocast(device, _backward, ctx, grad)
        return _backward(ctx, grad)


def _forward(operands: Operands) -> tuple[Tensor, Saved, Shares | None]:
    """The output (N, D_out), and what the backward pass needs."""
    output, weight, x, prior = operands.output, operands.weight, operands.x, operands.prior
    settings, dtype, experts = operands.settings, operands.dtype, _experts(operands)
    tokens = _tokens(x, dtype)
    shares = features = h = kept = None
    down, up = stack(experts), experts.B
    down, up = down if down.dtype == dtype else down.to(dtype), up if up.dtype == dtype else up.to(dtype)
    if gpu.available(tokens):
        features = tokens @ down.T
        logits = _with_logits(features.T, experts, settings).T
        mixed = gpu.mix(logits, prior, experts, settings)
    else:
        shares = Shares.of(experts, settings)
        products = _tokens_last(tokens, down)
        features = None if experts.router_down is None else products.T
        h = _wide(_with_logits(products, experts, settings))
        mixed = cpu.mix(h, experts.A.shape[0], prior, shares.scales(prior, settings), settings.layout == "paired")
        kept = mixed = (mixed if mixed.dtype == dtype else mixed.to(dtype)).T
    if output is None:
        output = F.linear(tokens, weight, operands.bias).addmm_(mixed, up.T)
    elif output.dtype == dtype:
        output = torch.addmm(output, mixed, up.T)
    else:
        output = output + (mixed @ up.T).to(output.dtype)
    cast = None if dtype == experts.A.dtype else down
    # B is kept in the dtype of the products, in its place between A and the router.
    return output, Saved(weight, x, experts.A, up, *experts[2:], prior, cast, features, h, kept), shares


def _backward(ctx: Any, grad: Tensor) -> Operands:
    saved, needs = Saved(*ctx.saved_tensors), Operands(*ctx.needs_input_grad)
    settings, dtype, experts, r_a = ctx.settings, ctx.dtype, _experts(saved), saved.A.shape[0]
    x, prior, features, mixed = saved.x, saved.prior, saved.features, saved.mixed
    down, up = stack(experts).to(dtype) if saved.down is None else saved.down, saved.B
    tokens = _tokens(x, dtype)
    outgoing = grad if grad.dtype == dtype else grad.to(dtype)
    if saved.h is None:
        logits = _with_logits(features.T, experts, settings).T
        mixed, d_h, d_omega, d_gate, d_prior = gpu.mix_backward(
            logits, outgoing @ up, prior, experts, settings, needs.prior
        )
    else:
        scales, paired = ctx.shares.scales(prior, settings), settings.layout == "paired"
        dm = _wide(_tokens_last(outgoing, up.T))
        d_h, d_prior, *sums = cpu.mix_backward(saved.h, r_a, prior, scales, dm, paired, needs.prior)
        d_omega, d_gate = (saved.h.new_full((1,), value) for value in ctx.shares.gradients(*sums, settings))
        d_h = d_h.T
        # Products in half precision take twice as long if the tokens do not stand first.
        if d_h.dtype != dtype:
            d_h = d_h.to(dtype, memory_format=torch.contiguous_format)
    d_up = None
    if saved.router_down is not None:
        d_logits = d_h[:, r_a:]
        d_up = d_logits.T @ features[:, r_a:]
        d_h = torch.cat((d_h[:, :r_a], d_logits @ saved.router.to(dtype)), -1)
    d_A, d_lower = (d_h.T @ tokens).split((r_a, len(down) - r_a))
    d_x = None
    if needs.x:
        d_x = d_h @ down if saved.weight is None else (outgoing @ saved.weight).addmm_(d_h, down)
        d_x = d_x.view(x.shape)
    # Autograd casts the gradients to the dtypes of what they belong to.
    return Operands(
        output=grad if saved.weight is None else None,
        x=d_x,
        A=d_A,
        B=(mixed.T @ outgoing).T,
        router=d_lower if d_up is None else d_up,
        router_down=None if d_up is None else d_lower,
        omega=d_omega,
        gate=d_gate,
        prior=d_prior,
    )


def _experts(values: Operands | Saved) -> Experts:
    return Experts(values.A, values.B, values.router, values.router_down, values.omega, values.gate)


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D_in), of (..., D_in)."""
    x = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return x if x.dtype == dtype else x.to(dtype)


def _tokens_last(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x.T` (r, N), of x (N, D) and a few rows (r, D); its strides are those of the faster product."""
    return weight @ x.T if x.dtype in WIDE else (x @ weight.T).T


def _wide(values: Tensor) -> Tensor:
    """The values in float32 or wider; contiguous where they were cast."""
    return values if values.dtype in WIDE else values.to(torch.float32, memory_format=torch.contiguous_format)


def _with_logits(features: Tensor, experts: Experts, settings: Settings) -> Tensor:
    """(r_a + E, N): the features with a reduced router's upper factor applied, and the strongest logits chosen."""
    if experts.router_down is None and settings.top_k is None:
        return features
    a, z = features.tensor_split((experts.A.shape[0],))
    if experts.router_down is not None:
        assert experts.router is not None
        z = experts.router.to(features.dtype) @ z
    if settings.top_k is not None:
        z = keep_strongest(z, settings.top_k, 0)
    return torch.cat((a, z))
