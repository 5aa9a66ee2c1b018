"""The paper on one page (T-REX, arXiv 2404.08985): a mixture of rank-one experts, as pure functions on tensors.

The adapter adds y to the frozen layer's output `W0 x`:

    a     = A x                                                         (T, r_a)
    G     = omega c_token softmax(R x) + (1 - omega) c_prior prior      (T, E)
    y     = gate B (a G)                                                (T, D_out)
    omega = sigmoid(temperature w),  gate = sigmoid(temperature g)

`r_a` input vectors and `r_b` output vectors make `E = r_a r_b` experts. The expert (i, j) is the rank-one matrix
`b_j a_i^T`, and stands at i * r_b + j. With 4 x 8 vectors the grid is:

    rows of A                     columns of B (output vectors)
    (input vectors)     b_0   b_1   b_2   b_3   b_4   b_5   b_6   b_7
               a_0        0     1     2     3     4     5     6     7
               a_1        8     9    10    11    12    13    14    15
               a_2       16    17    18    19    20    21    22    23
               a_3       24    25    26    27    28    29    30    31

In the paired layout, the paper's first version, r_a = r_b = E and the expert i is `b_i a_i^T`.

Axis legend: T tokens (any leading axes), D_in and D_out the layer's widths, E experts, B prompts of a batch, Q the
rank of a reduced router.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = Literal["grid", "paired"]
# The devices with autocast are listed beforehand, since torch 2.8 cannot ask for one within a compiled graph.
DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "maia", "privateuseone")
AUTOCAST = {device for device in DEVICES if torch.amp.is_autocast_available(device)}


class Experts(NamedTuple):
    """The tensors of one adapter in one layer; [`rank_one_mixture`] explains them."""

    A: Tensor  # (r_a, D_in)
    B: Tensor  # (D_out, r_b)
    router: Tensor | None = None  # (E, D_in), or (E, Q)
    router_down: Tensor | None = None  # (Q, D_in)
    omega: Tensor | None = None  # (1,), the logit w
    gate: Tensor | None = None  # (1,), the logit g


class Settings(NamedTuple):
    """The mixture's constants; [`rank_one_mixture`] explains them."""

    token_scale: float
    prior_scale: float = 4.0
    temperature: float = 100.0
    layout: Layout = "grid"
    top_k: int | None = None


def num_experts(r_a: int, r_b: int, layout: Layout = "grid") -> int:
    """Number of experts E that `r_a` input and `r_b` output vectors make."""
    return r_a * r_b if layout == "grid" else r_a


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`weight x` (..., r) of x (..., D), in float32 where it would be float16.

    Float16 ends at 65504. token_scale times a feature, or a gradient within the mixture, may lie beyond where the
    output and its gradients do not.
    """
    return _WideProduct.apply(x, weight) if is_narrow(weight) else F.linear(x, weight)


def is_narrow(weight: Tensor) -> bool:
    """Whether products with the weight are in float16, by its own dtype or by autocast's."""
    device = weight.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16 and weight.dtype != torch.float64
    return weight.dtype == torch.float16


class _WideProduct(torch.autograd.Function):
    """The product in float32 both ways. Compilers trace the backward pass within the forward's autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with no_autocast(x):
            return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with no_autocast(x):
            rows, tokens = grad.float().reshape(-1, len(weight)), x.float().reshape(-1, x.shape[-1])
            return (grad.float() @ weight.float()).to(x.dtype), (rows.T @ tokens).to(weight.dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which operations on the device of x are in the dtypes that they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in AUTOCAST else nullcontext()


def router_logits(x: Tensor, router: Tensor, router_down: Tensor | None = None) -> Tensor:
    """The token router's logits `R x` (..., E) of an input x (..., D_in)."""
    return product(x if router_down is None else product(x, router_down), router)


def keep_strongest(logits: Tensor, top_k: int, dim: int = -1) -> Tensor:
    """The logits, with all but the `top_k` largest along `dim` at minus infinity; of equal ones the first are kept."""
    if not 1 <= top_k <= logits.shape[dim]:
        raise ValueError(f"top_k={top_k} must be at least 1 and at most the number of experts, {logits.shape[dim]}.")
    order = logits.argsort(stable=True, dim=dim, descending=True)
    dropped = order.narrow(dim, top_k, logits.shape[dim] - top_k)
    return logits.scatter(dim, dropped, -torch.inf)


def weigh_experts(
    a: Tensor, logits: Tensor | None, prior: Tensor | None, omega: Tensor | None, settings: Settings
) -> Tensor:
    """Weight of every expert for every token, G (..., E), in float32 or wider.

    Args:
        a: (..., D), of which only the dtype and the number of axes matter.
        logits: (..., E), from [`router_logits`]; None without a router. G then has the prior's leading axes.
        prior, omega, settings: as in [`rank_one_mixture`].
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    by_token: Any = 1.0
    by_prior: Any = 1.0
    if omega is not None:
        by_token = torch.sigmoid(settings.temperature * omega.to(dtype))  # (1,)
        by_prior = 1 - by_token
    parts = []
    if logits is not None:
        if settings.top_k is not None:
            logits = keep_strongest(logits, settings.top_k)
        parts.append(by_token * settings.token_scale * torch.softmax(logits, dim=-1, dtype=dtype))
    if prior is not None:
        if prior.dim() == 2:  # one row for all tokens of a prompt
            prior = prior.reshape(prior.shape[0], *[1] * (a.dim() - 2), prior.shape[1])
        parts.append(by_prior * (settings.prior_scale * prior.to(dtype)))
    if not parts:
        raise ValueError("A mixture needs a `router`, a `prior`, or both; got neither.")
    return sum(parts[1:], start=parts[0])


def mix_features(a: Tensor, G: Tensor, layout: Layout = "grid") -> Tensor:
    """The mixed features `m = a G` (..., r_b) from a (..., r_a) and the experts' weights G (..., E)."""
    if layout == "paired":
        return a * G
    r_a = a.shape[-1]
    return (a.unsqueeze(-1) * G.unflatten(-1, (r_a, G.shape[-1] // r_a))).sum(-2)


def mixture_of(a: Tensor, logits: Tensor | None, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """The adapter's output (..., D_out) from two products with x: the features (..., r_a) and the logits (..., E)."""
    G = weigh_experts(a, logits, prior, experts.omega, settings)
    mixed = mix_features(a, G, settings.layout)
    # The gate is a scalar, and r_b features are fewer than D_out outputs.
    if experts.gate is not None:
        mixed = torch.sigmoid(settings.temperature * experts.gate.to(mixed.dtype)) * mixed
    return product(mixed.to(a.dtype), experts.B)


def apply_experts(x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """The output (..., D_out) of one adapter for x (..., D_in): [`rank_one_mixture`] with its arguments grouped."""
    _check_shapes(x, experts, prior, settings.layout)
    a = product(x, experts.A)
    logits = None if experts.router is None else router_logits(x, experts.router, experts.router_down)
    y = mixture_of(a, logits, experts, prior, settings)
    return y.to(torch.float16) if is_narrow(experts.B) else y


def rank_one_mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor | None = None,
    prior: Tensor | None = None,
    omega_logit: Tensor | None = None,
    gate_logit: Tensor | None = None,
    *,
    router_down: Tensor | None = None,
    token_scale: float,
    prior_scale: float = 4.0,
    temperature: float = 100.0,
    layout: Layout = "grid",
    top_k: int | None = None,
) -> Tensor:
    """Output of one T-REX adapter, `gate B (a G)` with `a = A x`; the base layer's output is not included.

    Args:
        x: (..., D_in), the layer's input.
        A: (r_a, D_in), one input vector a row.
        B: (D_out, r_b), one output vector a column.
        router: (E, D_in), the token router R. None leaves the token's part out (the ablation "no router").
        prior: (B, E) with B = x.shape[0], or 1 for all rows; or (B, T, E), one for each token. None leaves the prior's
            part out (the ablation "no prior").
        omega_logit: one element, w. None leaves omega and 1 - omega out.
        gate_logit: one element, g. None leaves the gate out.
        router_down: (Q, D_in), the lower factor of a reduced router, whose upper factor (E, Q) is then `router`;
            R is their product (ours, not the paper's).
        token_scale: c_token of the paper; the number of experts makes the mean expert's weight 1.
        prior_scale: c_prior of the paper.
        temperature: of both sigmoids.
        layout: "grid" or "paired"; the top of this file shows both.
        top_k: takes the router's softmax over the `top_k` largest logits alone; the other experts get the prior's
            part only. None takes all.

    Returns:
        (..., D_out) in the dtype of the last product. Softmax, weights and mix are computed in float32 or wider; in
        float16, whose range is small, all is.

    Raises:
        ValueError: for shapes that do not fit each other, an unknown layout, or neither router nor prior.
    """
    experts = Experts(A, B, router, router_down, omega_logit, gate_logit)
    return apply_experts(x, experts, prior, Settings(token_scale, prior_scale, temperature, layout, top_k))


def mean_core(experts: Experts, mean_prior: Tensor | None, settings: Settings) -> Tensor:
    """The static core C (r_b, r_a) of the mixture's mean routing, with which `m = C a`.

    The token router counts as uniform (1 / E for every expert), the prior as `mean_prior` (E,), None as zero. This is
    exact without a router and with that prior, and an approximation otherwise.
    """
    r_a, r_b = experts.A.shape[0], experts.B.shape[1]
    zeros = experts.A.new_zeros(1, num_experts(r_a, r_b, settings.layout))
    # Equal logits stand for a uniform router.
    logits = None if experts.router is None else zeros
    prior = zeros if mean_prior is None else mean_prior.reshape(zeros.shape)
    G = weigh_experts(experts.A, logits, prior, experts.omega, settings._replace(top_k=None))[0]
    return G.unflatten(0, (r_a, r_b)).T if settings.layout == "grid" else torch.diag(G)


def _check_shapes(x: Tensor, experts: Experts, prior: Tensor | None, layout: Layout) -> None:
    A, B, router, down, *_ = experts
    D_in = x.shape[-1]
    if layout not in ("grid", "paired"):
        raise ValueError(f"layout={layout!r} is unknown; use 'grid' or 'paired'.")
    if A.dim() != 2 or A.shape[1] != D_in:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected (r_a, D_in) with D_in = {D_in}, as in x.")
    if B.dim() != 2:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected (D_out, r_b).")
    r_a, r_b = A.shape[0], B.shape[1]
    if layout == "paired" and r_a != r_b:
        raise ValueError(f"The paired layout needs as many rows in A as columns in B; got {r_a} and {r_b}.")
    if down is not None and (router is None or down.dim() != 2 or down.shape[1] != D_in):
        shape = tuple(down.shape)
        raise ValueError(f"router_down has shape {shape}; expected (Q, D_in) with D_in = {D_in}, and a router (E, Q).")
    E = num_experts(r_a, r_b, layout)
    name, width = ("D_in", D_in) if down is None else ("Q", down.shape[0])
    if router is not None and tuple(router.shape) != (E, width):
        raise ValueError(f"router has shape {tuple(router.shape)}; expected (E, {name}) = {(E, width)}.")
    if prior is None:
        return
    shapes = f"prior has shape {tuple(prior.shape)} for x of shape {tuple(x.shape)}"
    if prior.shape[-1] != E or prior.dim() > x.dim() or (prior.dim() != 2 and (prior.dim(), x.dim()) != (3, 3)):
        raise ValueError(f"{shapes}; expected (B, E) or (B, T, E) with E = {E}.")
    if any(size not in (1, expected) for size, expected in zip(prior.shape[:-1], x.shape[:-1], strict=False)):
        raise ValueError(f"{shapes}; its leading axes must be those of x, or 1.")
