"""The mixture of rank-one experts as pure functions on tensors: the readable reference of the method.

Axis legend: T tokens (any leading axes), D_in and D_out the layer's widths, r_a input vectors, r_b output vectors,
E experts (r_a * r_b in the grid layout, r_a = r_b in the paired one), K clusters, B prompts of a batch, Q the rank
of a reduced router.

Source: T-REX, arXiv 2404.08985.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = Literal["grid", "paired"]


def num_experts(r_a: int, r_b: int, layout: Layout = "grid") -> int:
    """Number of rank-one experts E that `r_a` input and `r_b` output vectors make."""
    return r_a * r_b if layout == "grid" else r_a


def router_logits(x: Tensor, router: Tensor, router_down: Tensor | None = None) -> Tensor:
    """What the token router says of every expert, `z = R x` (..., E); arguments as in [`rank_one_mixture`]."""
    return F.linear(x if router_down is None else F.linear(x, router_down), router)


def expert_weights(
    x: Tensor,
    logits: Tensor | None = None,
    prior: Tensor | None = None,
    omega_logit: Tensor | None = None,
    *,
    token_scale: float,
    prior_scale: float = 4.0,
    temperature: float = 100.0,
    top_k: int | None = None,
) -> Tensor:
    """Weight of every expert for every token: `G = omega c_token softmax(z) + (1 - omega) c_prior prior`.

    `logits` (..., E) are [`router_logits`], None without a router; of `x` only dtype and number of axes matter. The
    other arguments are as in [`rank_one_mixture`]. Returns (..., E), in float32 or wider (x's dtype if that is
    float64). The leading axes are those of `x` with a router; without one they are the prior's, ready to broadcast
    against `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    omega = None if omega_logit is None else torch.sigmoid(temperature * omega_logit.to(dtype))  # (1,)
    G: Tensor | None = None
    if logits is not None:
        if top_k is not None:
            logits = keep_strongest(logits, top_k)
        token = torch.softmax(logits, dim=-1, dtype=dtype)
        G = token_scale * token if omega is None else omega * token_scale * token
    if prior is not None:
        if prior.dim() == 2:  # one row a prompt holds for all of its tokens
            prior = prior.reshape(prior.shape[0], *[1] * (x.dim() - 2), prior.shape[1])
        known = prior_scale * prior.to(dtype)
        known = known if omega is None else (1 - omega) * known
        G = known if G is None else G + known
    if G is None:
        raise ValueError("A mixture needs a `router`, a `prior`, or both; got neither.")
    return G


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
    """Output of one T-REX adapter, `gate * B (a G)` with `a = A x`; the base layer's output is not included.

    Args:
        x: (..., D_in), the layer's input.
        A: (r_a, D_in), one input vector a row.
        B: (D_out, r_b), one output vector a column.
        router: (E, D_in), the token router R. None leaves the token's part out (the ablation "no router").
        prior: (B, E) with B = x.shape[0], or 1 for all rows; or (B, T, E), one for each token. None leaves the prior's
            part out (the ablation "no prior").
        omega_logit: one element; omega = sigmoid(temperature * omega_logit) shares the weight between token (omega)
            and prior (1 - omega). None leaves the factor out of both.
        gate_logit: one element; gate = sigmoid(temperature * gate_logit) scales the output. None leaves it out.
        router_down: (Q, D_in), the lower factor of a reduced router, of which `router` is then the upper one, (E, Q);
            R is their product (ours, not the paper's).
        token_scale: c_token of the paper; the number of experts makes the mean expert's weight 1.
        prior_scale: c_prior of the paper.
        temperature: of both sigmoids.
        layout: "grid": expert (i, j) is b_j a_i^T and stands at i * r_b + j. "paired" (the paper's first version):
            r_a = r_b = E and expert i is b_i a_i^T.
        top_k: the token router's softmax is over the `top_k` experts of the largest logits alone; the others get
            nothing of its part (the authors' code names it and raises). None takes all. The prior's part stays whole.

    Returns:
        (..., D_out) in the dtype of the last product. Softmax, weights and mix are computed in float32 or wider.

    Raises:
        ValueError: for shapes that do not fit each other, an unknown layout, or neither router nor prior.
    """
    _check_shapes(x, A, B, router, router_down, prior, layout)
    a = F.linear(x, A)  # (..., r_a)
    logits = None if router is None else router_logits(x, router, router_down)  # (..., E)
    return mixture_of(
        a,
        logits,
        B,
        prior,
        omega_logit,
        gate_logit,
        token_scale=token_scale,
        prior_scale=prior_scale,
        temperature=temperature,
        layout=layout,
        top_k=top_k,
    )


def mixture_of(
    a: Tensor,
    logits: Tensor | None,
    B: Tensor,
    prior: Tensor | None,
    omega_logit: Tensor | None,
    gate_logit: Tensor | None,
    *,
    token_scale: float,
    prior_scale: float = 4.0,
    temperature: float = 100.0,
    layout: Layout = "grid",
    top_k: int | None = None,
) -> Tensor:
    """What [`rank_one_mixture`] makes of its products with x, the features a (..., r_a) and the logits (..., E)."""
    G = expert_weights(
        a,
        logits,
        prior,
        omega_logit,
        token_scale=token_scale,
        prior_scale=prior_scale,
        temperature=temperature,
        top_k=top_k,
    )  # (..., E)
    mixed = mix_features(a, G, layout)  # (..., r_b)
    if gate_logit is not None:  # a scalar: on r_b features it costs less than on D_out
        mixed = torch.sigmoid(temperature * gate_logit.to(mixed.dtype)) * mixed
    return F.linear(mixed.to(a.dtype), B)  # (..., D_out)


def keep_strongest(logits: Tensor, top_k: int, dim: int = -1) -> Tensor:
    """The logits, with all but the `top_k` largest along `dim` at minus infinity; of equal ones the first are kept."""
    if not 1 <= top_k <= logits.shape[dim]:
        raise ValueError(f"top_k={top_k} must be at least 1 and at most the number of experts, {logits.shape[dim]}.")
    order = logits.argsort(stable=True, dim=dim, descending=True)
    dropped = order.narrow(dim, top_k, logits.shape[dim] - top_k)
    return logits.scatter(dim, dropped, -torch.inf)


def mix_features(a: Tensor, G: Tensor, layout: Layout = "grid") -> Tensor:
    """What B is applied to, `m = a G` (..., r_b), from a (..., r_a) and the experts' weights G (..., E)."""
    if layout == "paired":
        return a * G  # r_a = r_b = E
    r_a = a.shape[-1]
    return (a.unsqueeze(-1) * G.unflatten(-1, (r_a, G.shape[-1] // r_a))).sum(-2)


def mean_core(
    r_a: int,
    r_b: int,
    mean_prior: Tensor | None = None,
    omega_logit: Tensor | None = None,
    *,
    use_router: bool = True,
    token_scale: float,
    prior_scale: float = 4.0,
    temperature: float = 100.0,
    layout: Layout = "grid",
) -> Tensor:
    """The static core C (r_b, r_a) of the mixture's mean routing, with which `m = C a`.

    The token router is taken as uniform (1 / E for every expert), the prior at `mean_prior` (E,). Exact when there is
    no router and the prior is that one, an approximation otherwise. Arguments as in [`rank_one_mixture`].
    """
    experts = num_experts(r_a, r_b, layout)
    like = next((tensor for tensor in (omega_logit, mean_prior) if tensor is not None), torch.empty(0))
    G = expert_weights(
        like.new_zeros(1, 1),
        like.new_zeros(1, experts) if use_router else None,  # equal logits, whatever the input
        like.new_zeros(1, experts) if mean_prior is None else mean_prior.reshape(1, experts),
        omega_logit,
        token_scale=token_scale,
        prior_scale=prior_scale,
        temperature=temperature,
    ).reshape(experts)
    return G.unflatten(0, (r_a, r_b)).T if layout == "grid" else torch.diag(G)


def _check_shapes(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor | None,
    router_down: Tensor | None,
    prior: Tensor | None,
    layout: str,
) -> None:
    if layout not in ("grid", "paired"):
        raise ValueError(f"layout={layout!r} is unknown; use 'grid' or 'paired'.")
    if A.dim() != 2 or A.shape[1] != x.shape[-1]:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected (r_a, D_in) with D_in = {x.shape[-1]}, as in x.")
    if B.dim() != 2:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected (D_out, r_b).")
    r_a, r_b = A.shape[0], B.shape[1]
    if layout == "paired" and r_a != r_b:
        raise ValueError(f"The paired layout needs as many rows in A as columns in B; got {r_a} and {r_b}.")
    experts = num_experts(r_a, r_b, layout)  # type: ignore[arg-type]
    if router_down is not None and (router is None or router_down.dim() != 2 or router_down.shape[1] != x.shape[-1]):
        raise ValueError(
            f"router_down has shape {tuple(router_down.shape)}; expected (Q, D_in) with D_in = {x.shape[-1]}, and a "
            "router (E, Q) with it."
        )
    width = x.shape[-1] if router_down is None else router_down.shape[0]
    if router is not None and tuple(router.shape) != (experts, width):
        raise ValueError(
            f"router has shape {tuple(router.shape)}; expected (E, {'D_in' if router_down is None else 'Q'}) = "
            f"{(experts, width)}."
        )
    if prior is None:
        return
    if prior.shape[-1] != experts or prior.dim() > x.dim() or (prior.dim() != 2 and (prior.dim(), x.dim()) != (3, 3)):
        raise ValueError(
            f"prior has shape {tuple(prior.shape)} for x of shape {tuple(x.shape)}; expected (B, E) or (B, T, E) "
            f"with E = {experts}."
        )
    if any(found not in (1, wanted) for found, wanted in zip(prior.shape[:-1], x.shape[:-1], strict=False)):
        raise ValueError(
            f"prior has shape {tuple(prior.shape)}, x {tuple(x.shape)}: its leading axes must be x's, or 1."
        )
