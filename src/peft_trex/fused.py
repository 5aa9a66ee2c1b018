"""The fast path of the mixture: what [`rank_one_mixture`] computes, with a backward pass written by hand.

It keeps the layer's input, what [A; R] makes of it, (N, r_a + E), and what B is applied to, (N, r_b): nothing of width
D_out. Softmax, weights and mix are in float32 or wider; the products with A, R and B are in the dtype of the input, or
of autocast. A base layer that is plain and frozen has its products made here too, so that its output and the gradient
of its input are written once. `mixture.py` is the ground truth, and explains the axes; here N is the number of tokens
of all rows, and P that of the prior's rows, each of which holds for N / P tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernels
from .mixture import Layout, keep_strongest, mixture_of
from .vectorised import Scales, mix, mix_backward

try:
    from torch.nn.modules.module import _has_any_global_hook
except ImportError:  # pragma: no cover

    def _has_any_global_hook() -> Any:
        # Without this private name of torch, hooks for all modules cannot be seen. They are taken to be there, so each
        # base layer is called as a module, which costs some time and changes nothing else.
        return True


SHORT = {torch.bfloat16, torch.float16}
# CPUs without AVX-512 have no products in half precision; PyTorch's substitutes take up to ten times as long
SLOW_ON_CPU = SHORT if torch.backends.cpu.get_cpu_capability() == "AVX2" else set()
WIDE = {torch.float32, torch.float64}
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


def separable(layer: nn.Module) -> bool:
    """Whether a layer does nothing but multiply by frozen weights, so that its product may be made elsewhere."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or _has_any_global_hook():
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    for each in layer._parameters.values():  # for which another kind of tensor may stand
        if each is not None and (type(each) is not nn.Parameter or each.requires_grad):
            return False
    return True


def add_mixture(
    base: Tensor | nn.Linear,
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
    """The base layer's output plus that of one adapter, as [`rank_one_mixture`] defines it.

    Args:
        base: (..., D_out), what the adapter's output is added to; it is not changed. Or the base layer itself, if
            it is [`separable`]: both then share one cast of the input, one output and one gradient of the input.
        x, A, B, router, router_down, prior, omega_logit, gate_logit: as in [`rank_one_mixture`]; router, omega_logit
            and gate_logit must be there.
        settings: the constants.

    Returns:
        (..., D_out) in the dtype of the base layer's output.

    Raises:
        NotImplementedError: by the backward pass, for `create_graph=True`.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    # not whatever is short: a checkpointed forward, without gradients, must round as its second run does
    if device == "cpu" and x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= FEW and not torch.is_grad_enabled():
        if isinstance(base, Tensor):
            result = base.clone(memory_format=torch.contiguous_format)
        else:
            result = F.linear(x, base.weight, base.bias)
        arguments: tuple[Any, ...] = (x, A, B, router, router_down, prior, omega_logit, gate_logit, settings)
        return _without_autocast(device, _decode, result, *arguments) if autocast else _decode(result, *arguments)
    dtype = x.dtype
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    slow = device == "cpu" and dtype in SLOW_ON_CPU
    if slow:
        dtype = torch.float32
    if prior is not None and prior.dim() == 3:  # one row for each token
        prior = prior.expand(*x.shape[:-1], prior.shape[-1]).flatten(0, 1)
    rows: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    if not isinstance(base, Tensor) and not slow:
        weight, bias = base.weight, base.bias
    else:
        result = base if isinstance(base, Tensor) else base(x)
        # a view that an autograd function returned could not be changed in place, by an activation for instance
        rows = result.reshape(-1, result.shape[-1])
    arguments = (A, B, router, router_down, prior, omega_logit, gate_logit, settings, dtype)
    shape = (*x.shape[:-1], B.shape[0])
    if not autocast:
        return _run(rows, weight, bias, x, *arguments).view(shape)
    x = x if dtype == torch.float32 else x.to(dtype)
    weight, bias = (each if each is None else each.to(dtype) for each in (weight, bias))
    return _without_autocast(device, _run, rows, weight, bias, x, *arguments).view(shape)


def add_stacked(
    base: Tensor,
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
    """What [`add_mixture`] returns, by the formula and autograd: for compilers, and where there is no fast path.

    The input is read once, by one product with [A; R], which a compiler does not see in two. `x` has A's dtype.
    """
    a, z = F.linear(x, _stack(A, router, router_down)).tensor_split((settings.r_a,), -1)
    logits = z if router_down is None else F.linear(z, router)
    constants = {name: value for name, value in settings._asdict().items() if name != "r_a"}
    return base + mixture_of(a, logits, B, prior, omega_logit, gate_logit, **constants).to(base.dtype)


def _without_autocast(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """As within `torch.autocast(device, enabled=False)`, where autocast is on.

    The context takes four to eight times as long to set up, in each layer.
    """
    torch.set_autocast_enabled(device, False)
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_enabled(device, True)


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
    """Adds the output for x (B, 1, D_in) to `result`, with few calls: on a CPU they are what decoding costs."""
    alone = x.shape[0] == 1  # one row is a vector, and products with it take half as long
    x = x.view(-1) if alone else x
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
    scales = Shares(_number(omega_logit, settings), _number(gate_logit, settings)).scales(prior, settings)
    if prior is not None:
        if not alone:
            prior = prior.view(-1, 1, prior.shape[-1])
        if scales.token == 1:
            G = torch.add(G, prior, alpha=scales.known)
        else:
            G = torch.add(prior, G, alpha=scales.token)
    r_a, r_b = settings.r_a, B.shape[1]
    if settings.layout == "paired":
        m = (a * G).view(a.shape)
    elif alone:
        m = torch.mv(G.as_strided((r_b, r_a), (1, r_b)), a)
    else:
        m = torch.matmul(a.unsqueeze(-2), G.view(*a.shape, r_b)).squeeze(-2)
    m = m if m.dtype == A.dtype else m.to(A.dtype)
    if alone and result.dtype == A.dtype:
        result.view(-1).addmv_(B, m, alpha=scales.larger)
        return result
    delta = apply(m, B)
    return result.add_(delta if delta.dtype == result.dtype else delta.to(result.dtype), alpha=scales.larger)


def _apply_to_vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x)


def _forward(
    result: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
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
) -> tuple[Tensor, list[Any]]:
    """The output (N, D_out), and what the backward pass needs besides the arguments.

    What is added to is `result` (N, D_out), or else the product with the base layer's weight.
    """
    tokens, shares, h = _tokens(x, dtype), None, None
    kept: Tensor | None
    down = _stack(A, router, router_down)
    down, up = down if down.dtype == dtype else down.to(dtype), B if B.dtype == dtype else B.to(dtype)
    if kernels.available(tokens):
        features = tokens @ down.T  # (N, r_a + E), or (N, r_a + Q) if the router is reduced
        logits = _with_logits(features.T, router, router_down, settings).T
        mixed = kernels.mix(logits, prior, omega_logit, gate_logit, **settings.of_kernels())  # (N, r_b)
        kept = features  # of which a kernel makes the rest again, in less time than keeping it takes
    else:
        shares = Shares(_number(omega_logit, settings), _number(gate_logit, settings))
        features = _tokens_last(tokens, down)
        kept = None if router_down is None else features.T
        h = _wide(_with_logits(features, router, router_down, settings))
        mixed = mix(h, settings.r_a, prior, shares.scales(prior, settings), paired=settings.layout == "paired")
        mixed = (mixed if mixed.dtype == dtype else mixed.to(dtype)).T
    if result is None:
        assert weight is not None
        output = F.linear(tokens, weight, bias).addmm_(mixed, up.T)
    elif result.dtype == dtype:  # in one pass
        output = torch.addmm(result, mixed, up.T)
    else:
        output = result + (mixed @ up.T).to(result.dtype)
    cast = None if dtype == A.dtype else down  # to stack again costs little, to cast again does not
    return output, [cast, up, kept, h, None if h is None else mixed, shares]


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Any, weight: Any, bias: Any, x: Tensor, A: Any, B: Any, *rest: Any) -> Tensor:
        output, (*kept, ctx.shares) = _forward(result, weight, bias, x, A, B, *rest)
        *tensors, ctx.settings, ctx.dtype = rest
        ctx.save_for_backward(weight, x, A, *tensors, *kept)
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
            return _without_autocast(device, _backward, ctx, grad)
        return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x, A, router, router_down, prior, omega_logit, gate_logit, *kept = ctx.saved_tensors
    down, up, features, h, mixed = kept
    settings, dtype = ctx.settings, ctx.dtype
    down = _stack(A, router, router_down).to(dtype) if down is None else down
    r_a = settings.r_a
    needs_x, needs_prior = ctx.needs_input_grad[3], ctx.needs_input_grad[8]
    tokens = _tokens(x, dtype)
    outgoing = grad if grad.dtype == dtype else grad.to(dtype)
    if h is None:
        logits = _with_logits(features.T, router, router_down, settings).T
        mixed, d_h, d_omega, d_gate, d_prior = kernels.mix_backward(
            logits, outgoing @ up, prior, omega_logit, gate_logit, needs_prior=needs_prior, **settings.of_kernels()
        )
    else:
        scales, paired = ctx.shares.scales(prior, settings), settings.layout == "paired"
        dm = _wide(_tokens_last(outgoing, up.T))
        d_h, token, known, d_prior = mix_backward(h, r_a, prior, scales, dm, paired=paired, needs_prior=needs_prior)
        d_omega, d_gate = (h.new_full((1,), each) for each in ctx.shares.gradients(token, known, settings))
        d_h = d_h.T
        if d_h.dtype != dtype:  # products in half precision take twice as long if the tokens do not stand first
            d_h = d_h.to(dtype, memory_format=torch.contiguous_format)
    d_up = None
    if router_down is not None:
        d_logits = d_h[:, r_a:]
        d_up = d_logits.T @ features[:, r_a:]
        d_h = torch.cat((d_h[:, :r_a], d_logits @ router.to(dtype)), -1)
    d_A, d_lower = (d_h.T @ tokens).split((r_a, len(down) - r_a))
    d_x = None
    if needs_x:
        d_x = (d_h @ down if weight is None else (outgoing @ weight).addmm_(d_h, down)).view(x.shape)
    return (  # autograd takes care of the dtypes
        grad if weight is None else None,
        None,
        None,
        d_x,
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


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D_in), of (..., D_in)."""
    x = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return x if x.dtype == dtype else x.to(dtype)


def _tokens_last(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x.T` (r, N), of x (N, D) and a few rows (r, D); its strides are those of the faster product."""
    return weight @ x.T if x.dtype in WIDE else (x @ weight.T).T


def _wide(values: Tensor) -> Tensor:
    """In float32 or wider, as softmax, weights and mix are computed; contiguous."""
    return values if values.dtype in WIDE else values.to(torch.float32, memory_format=torch.contiguous_format)


def _stack(A: Tensor, router: Tensor, router_down: Tensor | None) -> Tensor:
    """[A; R], (r_a + E, D_in), or (r_a + Q, D_in)."""
    return torch.cat((A, router if router_down is None else router_down))


def _with_logits(features: Tensor, router: Tensor, router_down: Tensor | None, settings: MixSettings) -> Tensor:
    """(r_a + E, N): what [A; R] leaves to do is done, a reduced router's upper factor and the choice of experts."""
    if router_down is None and settings.top_k is None:
        return features
    a, z = features.tensor_split((settings.r_a,))
    if router_down is not None:
        z = router.to(features.dtype) @ z
    if settings.top_k is not None:
        z = keep_strongest(z, settings.top_k, 0)
    return torch.cat((a, z))


def _number(logit: Tensor, settings: MixSettings) -> float:
    """Sigmoid of a one-element logit, as a number: on a CPU that costs less than a tensor."""
    scaled = settings.temperature * float(logit)
    grown = math.exp(-abs(scaled))  # which never overflows
    return 1 / (1 + grown) if scaled > 0 else grown / (1 + grown)


class Shares(NamedTuple):
    """omega and the gate, as numbers."""

    omega: float
    gate: float

    def scales(self, prior: Tensor | None, settings: MixSettings) -> Scales:
        """What the token's part and the prior's are multiplied by."""
        by_token, by_prior = self.omega * settings.token_scale, (1 - self.omega) * settings.prior_scale
        return Scales.of(self.gate * by_token, 0.0 if prior is None else self.gate * by_prior)

    def gradients(self, token: float, known: float, settings: MixSettings) -> tuple[float, float]:
        """Of the two logits, from both parts' shares in the sum of m * dm."""
        return (
            settings.temperature * ((1 - self.omega) * token - self.omega * known),
            settings.temperature * (1 - self.gate) * (token + known),
        )
