"""The mix as a GPU kernel: all between the product with [A; R] and the one with B, in one launch each way.

In plain PyTorch the mix is some ten small operations on (N, E) tensors, and decoding a token waits for their launches.
Triton is optional: without it this module can still be imported, and `available` is False.

Axis legend: N tokens, E experts, P rows of the prior. A program takes BLOCK tokens, each with its experts as a grid of
IN x OUT, padded to powers of two: r_a x r_b, or 1 x E in the paired layout, so that m is a sum over IN in both.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..mixture import Experts, Layout, Settings

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_ELEMENTS = 1024  # padded experts of a program: 8 for each thread of its four warps
WARPS = 4


def available(x: Tensor) -> bool:
    """Whether the kernels can take `x`: on a GPU, in float32, float16 or bfloat16, and Triton can be imported."""
    return triton is not None and x.is_cuda and x.dtype in DTYPES


def _jit(function: Any) -> Any:
    """A kernel; where there is no Triton, the function as it is."""
    if triton is None:
        return function
    # These differ from batch to batch, and a specialised kernel would be compiled anew for each.
    return triton.jit(function, do_not_specialize=["tokens", "tokens_per_prior"])


@_jit
def _sigmoid(logit, temperature):  # type: ignore[no-untyped-def]
    return 1 / (1 + tl.exp(-temperature * tl.load(logit).to(tl.float32)))


@_jit
def _mix(  # type: ignore[no-untyped-def]
    h, prior, omega_logit, gate_logit, u, du, dh, d_logits, d_prior,
    tokens, row, tokens_per_prior, token_scale, prior_scale, temperature,
    R_A: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK: tl.constexpr, IN_PADDED: tl.constexpr, OUT_PADDED: tl.constexpr,
):  # fmt: skip
    """The mixed features, and the gradients where `du` is not None. In the padding of IN and OUT, a and p are zero."""
    token = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    i = tl.arange(0, IN_PADDED)[None, :, None]
    j = tl.arange(0, OUT_PADDED)[None, None, :]
    seen = token < tokens
    seen_i, seen_j = seen & (i < IN), seen & (j < OUT)
    inside = (i < IN) & (j < OUT)
    expert = i * OUT + j
    omega = _sigmoid(omega_logit, temperature)
    gate = _sigmoid(gate_logit, temperature)
    h = h + token * row
    # a is (BLOCK, IN, 1), or (BLOCK, 1, OUT) in the paired layout; p, G and slope, dG / domega, are (BLOCK, IN, OUT).
    a = tl.load(h + (j if PAIRED else i), mask=seen_j if PAIRED else seen_i, other=0.0).to(tl.float32)
    z = tl.load(h + R_A + expert, mask=seen & inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z, float("-inf"))
    p = tl.exp(z - tl.max(tl.max(z, axis=2, keep_dims=True), axis=1, keep_dims=True))
    p = p / tl.sum(tl.sum(p, axis=2, keep_dims=True), axis=1, keep_dims=True)
    slope = token_scale * p
    G = omega * slope
    if prior is not None:
        by_prior = tl.load(prior + token // tokens_per_prior * (IN * OUT) + expert, mask=seen & inside, other=0.0)
        by_prior = prior_scale * by_prior.to(tl.float32)
        slope -= by_prior
        G += (1 - omega) * by_prior
    m = tl.sum(a * G, axis=1, keep_dims=True)
    tl.store(u + token * OUT + j, (gate * m).to(u.dtype.element_ty), mask=seen_j)
    if du is not None:
        d_u = tl.load(du + token * OUT + j, mask=seen_j, other=0.0).to(tl.float32)
        dm = gate * d_u
        dG = a * dm
        dp = omega * token_scale * dG
        dz = p * (dp - tl.sum(tl.sum(p * dp, axis=2, keep_dims=True), axis=1, keep_dims=True))
        dh = dh + token * (R_A + IN * OUT)
        tl.store(dh + R_A + expert, dz.to(dh.dtype.element_ty), mask=seen & inside)
        if PAIRED:
            tl.store(dh + j, (G * dm).to(dh.dtype.element_ty), mask=seen & inside)
        else:
            da = tl.sum(G * dm, axis=2, keep_dims=True)
            tl.store(dh + i, da.to(dh.dtype.element_ty), mask=seen_i)
        if d_prior is not None:
            tl.store(d_prior + token * (IN * OUT) + expert, (1 - omega) * prior_scale * dG, mask=seen & inside)

        # PyTorch adds up one partial sum for each program: unlike atomics, this gives the same result in every run.
        d_logits = d_logits + tl.program_id(0)
        tl.store(d_logits, tl.sum(dG * slope) * temperature * omega * (1 - omega))
        tl.store(d_logits + tl.num_programs(0), tl.sum(d_u * m) * temperature * gate * (1 - gate))


def mix(h: Tensor, prior: Tensor | None, experts: Experts, settings: Settings) -> Tensor:
    """The mixed features `u = gate * (a G)`, (N, r_b), in bfloat16 as h or in float32: float16 may be too narrow.

    Args:
        h: (N, r_a + E), `A x` and then `R x`, in float32, float16 or bfloat16; may be a slice of wider rows.
        prior: (P, E), one row for every N / P tokens, in any float dtype. None leaves the prior's part out.
        experts: omega, gate and the sizes of A and B are read; both logits are on the device of `h`.
        settings: of the mixture; the logits in `h` say already which experts are left by top_k.
    """
    u = h.new_empty(len(h), experts.B.shape[1], dtype=_wide_enough(h))
    _launch(h, prior, experts, settings, u, None, None, None, None)
    return u


def mix_backward(
    h: Tensor, du: Tensor, prior: Tensor | None, experts: Experts, settings: Settings, needs_prior: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of [`mix`] from its arguments and `du` (N, r_b); everything between them is computed again.

    Returns:
        u: (N, r_b), as from [`mix`]: the gradient of B needs it.
        dh: (N, r_a + E), in the dtype of u, contiguous.
        d_omega, d_gate: one element each, float32.
        d_prior: (P, E), float32, which needs (N, E) numbers for a moment; None without a prior or `needs_prior`.
    """
    r_a, d_prior = len(experts.A), None
    block = _shape(h, r_a, settings.layout)["BLOCK"]
    u, dh = (h.new_empty(shape, dtype=_wide_enough(h)) for shape in (du.shape, h.shape))
    d_logits = h.new_empty(2, -(-len(h) // block), dtype=torch.float32)
    if prior is not None and needs_prior:
        d_prior = h.new_empty(len(h), h.shape[1] - r_a, dtype=torch.float32)
    _launch(h, prior, experts, settings, u, du.contiguous(), dh, d_logits, d_prior)
    d_omega, d_gate = d_logits.sum(1).split(1)
    if prior is not None and d_prior is not None:
        d_prior = d_prior.reshape(len(prior), _tokens_per_prior(h, prior), h.shape[1] - r_a).sum(1)
    return u, dh, d_omega, d_gate, d_prior


def _launch(h: Tensor, prior: Tensor | None, experts: Experts, settings: Settings, *tensors: Tensor | None) -> None:
    """Run the kernel; `tensors` are its arguments from `u` to `d_prior`."""
    if not len(h):
        return
    shape = _shape(h, len(experts.A), settings.layout)
    h, prior = h if h.stride(1) == 1 else h.contiguous(), None if prior is None else prior.contiguous()
    # Triton launches on the current device, which in a model that is spread over several need not be h's.
    with torch.cuda.device(h.device) if h.is_cuda else nullcontext():
        _mix[(triton.cdiv(len(h), shape["BLOCK"]),)](
            *(h, prior, experts.omega, experts.gate, *tensors),
            *(len(h), h.stride(0), _tokens_per_prior(h, prior)),
            *(float(settings.token_scale), float(settings.prior_scale), float(settings.temperature)),
            **shape,
            num_warps=WARPS,
        )


def _wide_enough(h: Tensor) -> torch.dtype:
    return torch.float32 if h.dtype == torch.float16 else h.dtype


def _tokens_per_prior(h: Tensor, prior: Tensor | None) -> int:
    return 1 if prior is None else len(h) // max(1, len(prior))


def _shape(h: Tensor, r_a: int, layout: Layout) -> dict[str, Any]:
    """The constants that a kernel is compiled for."""
    experts = h.shape[1] - r_a
    rows, columns = (r_a, experts // r_a) if layout == "grid" else (1, experts)
    padded_rows, padded_columns = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    return {
        "R_A": r_a,
        "IN": rows,
        "OUT": columns,
        "PAIRED": layout == "paired",
        "BLOCK": max(1, BLOCK_ELEMENTS // (padded_rows * padded_columns)),
        "IN_PADDED": padded_rows,
        "OUT_PADDED": padded_columns,
    }
