"""The choice among the ways to compute a mixture: the formula, the formula for compilers, decoding, and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixture import Experts, Settings, apply_experts, mixture_of, product
from . import gpu
from .autograd import add_fused, stack, without_autocast
from .base import Base
from .core import fold, takes_numbers
from .cpu import decode

FEW = 64  # rows, up to which decoding costs more for its calls than for its arithmetic


def add_mixture(
    base: Base, x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings, fast: bool = True
) -> Tensor:
    """The base layer's output plus that of one adapter, [`rank_one_mixture`]; nothing that it gets is changed.

    Args:
        base: the base layer's part, with the layer's own input.
        x: (..., D_in), the adapter's input: that of `base`, or what a cast and dropout made of it.
        experts, prior, settings: as in [`rank_one_mixture`], with omega and gate; or experts of A and B alone, and
            what [`fold`] makes of the others.
        fast: False for the formula.

    Returns:
        (..., D_out) in the dtype of the base layer's output.
    """
    if not fast:
        output = base.compute()
        return output + apply_experts(x, experts, prior, settings).to(output.dtype)
    folded = experts.omega is None and experts.gate is None
    if experts.router is None and not folded and not weighs_itself(base.x, experts):
        prior, settings = fold(experts, prior, settings)
        experts = Experts(experts.A, experts.B)
    if not is_fast(base.x, experts.A):
        return add_stacked(base.compute(), x, experts, prior, settings)
    if x is not base.x:
        base = Base(base.x, None, base.compute())
    # Only single tokens are decoded, not all short inputs: a checkpointed forward runs without gradients at first, and
    # must round as its second run does.
    if x.is_cpu and x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= FEW and not torch.is_grad_enabled():
        output = base.compute()
        if base.layer is None:
            output = output.clone(memory_format=torch.contiguous_format)
        return without_autocast("cpu", decode, output, x, experts, prior, settings)
    return add_fused(base, x, experts, prior, settings)


def add_stacked(output: Tensor, x: Tensor, experts: Experts, prior: Tensor | None, settings: Settings) -> Tensor:
    """The formula for compilers and for devices without a fast path: one product with [A; R] reads x once."""
    a, z = product(x, stack(experts)).tensor_split((experts.A.shape[0],), -1)
    logits: Tensor | None = z
    if experts.router is None:
        logits = None
    elif experts.router_down is not None:
        logits = product(z, experts.router)
    return output + mixture_of(a, logits, experts, prior, settings).to(output.dtype)


def weighs_itself(x: Tensor, experts: Experts) -> bool:
    """Whether experts without a router need no [`fold`]: in training on a CPU, [`add_mixture`] makes their weights."""
    return experts.router is None and torch.is_grad_enabled() and takes_numbers(x, experts) and is_fast(x, experts.A)


def is_fast(x: Tensor, A: Tensor) -> bool:
    """Whether a layer's input can take the fast path: it is a plain tensor on a CPU, or where the kernels run."""
    if type(x) is not Tensor or not (x.is_cpu or (gpu.available(x) and gpu.available(A))):
        return False
    # torch.compile fuses the plain formula better than our kernel, so traced calls take the formula.
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())
